"""Measures triojobs beside bare SQL and its peers, on one private server. See bench/README.rst.

`python -m bench --help` lists the measures, `python -m bench.peers install` installs the peers.
"""
