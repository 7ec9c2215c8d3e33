"""Suites: schema, plan, and the running of their cells on one machine or many."""
