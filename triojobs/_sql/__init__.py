"""Layer L2: the SQL, synchronous, on psycopg connections that others own; one module per concern.

Lock order everywhere: worker_groups → jobs (an operator's retry only) → ready, scheduled → leases
(in id order) → keys (in key order) → outcomes. READ COMMITTED always.
"""
