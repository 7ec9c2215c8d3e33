"""The learned confidence of the studies (papers.md 1.7): hidden states of a run, and the Selector fitted on them."""
