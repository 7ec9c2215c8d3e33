"""The leaderboard: submissions kept in git, validated and built into a static site from `bitquake.reports`.

``submit.submit`` makes a submission from runs, ``validate.validate`` checks submissions, ``site.build_site`` computes
their numbers from the answers and writes the site. None of them needs torch or lmms-eval.
"""
