"""Reports on runs: what was measured, how runs compare, verdicts on claims, and how all of it is shown.

``measured`` alone knows the shape of a run's files; ``comparison`` compares runs with their controls;
``paper.claims`` judges what the paper says; ``page`` and ``markdown`` write it down. Only ``report`` and
``explore`` read files.
"""
