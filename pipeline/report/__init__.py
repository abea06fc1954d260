"""What runs show: what they measured, how they compare, what becomes of claims, and how it is shown.

``measured`` alone knows the shape of a run's files; ``comparison`` sets runs beside their controls;
``claims`` judges what the paper says; ``page`` and ``markdown`` write it down. No file is read here.
"""
