"""The offline block world: seeded pictures and questions in the formats of the five benchmarks (DESIGN.md, section 3).

``scenes`` draws pictures, ``annotators`` simulates the ten people who answer, ``questions`` asks, ``captions`` lets
five of them describe a picture, ``degradations`` spoils photos for the VizWiz twin, ``splits`` lays out the splits
and ``build`` writes the shipped parquet files.
"""

from __future__ import annotations
