"""The suites: one YAML file for each study (`bitquake run NAME`)."""
