"""Task families and what runs them: YAML files, their expansion into lmms-eval tasks, scoring, the offline block world.

``families`` reads and checks a family file; ``expand`` writes plain lmms-eval task files; ``glue`` is what those files
call; ``documents`` prepares rows; ``scoring`` is pure; ``aggregate`` fills the results table; ``catalog`` is for the
command line.
"""
