"""GRACE's information-bottleneck controller: how much the distillation weighs follows its own loss."""

from __future__ import annotations

from collections.abc import Mapping


class BottleneckController:
    """``beta <- clip(beta + eta * (EMA(loss) - tau), beta_min, beta_max)``, once for each step of the optimiser.

    Projected dual ascent (arXiv 2601.22709; papers.md 3.1): above the budget tau the teacher gains weight, below it the
    task does. The moving average begins with the first loss.

    Attributes:
        beta: the weight now.
        average: the loss's moving average; None before the first update.
    """

    def __init__(self, *, tau: float, eta: float, beta: float, beta_min: float, beta_max: float, decay: float) -> None:
        self.tau, self.eta, self.beta_min, self.beta_max, self.decay = tau, eta, beta_min, beta_max, decay
        self.beta = beta
        self.average: float | None = None

    def update(self, loss: float) -> float:
        """Take a step's distillation loss, averaged over its passes and all processes; returns the new beta."""
        self.average = loss if self.average is None else self.decay * self.average + (1.0 - self.decay) * loss
        self.beta = min(self.beta_max, max(self.beta_min, self.beta + self.eta * (self.average - self.tau)))
        return self.beta

    def state_dict(self) -> dict[str, float | None]:
        """What changes, as JSON holds it."""
        return {"beta": self.beta, "average": self.average}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Go on from ``state_dict``'s state."""
        beta = state["beta"]
        assert beta is not None
        self.beta, self.average = beta, state["average"]
