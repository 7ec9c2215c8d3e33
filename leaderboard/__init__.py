"""The leaderboard: submissions kept in git, validated and built into a static site from `bitquake.reports`.

Nothing is published yet: a first report of one's own runs comes from `bitquake report` (`bitquake.reports.build`).
"""
