"""Chaos: worker processes, a server and clients under random violence, and the proof afterwards.

    python -m tests.chaos --jobs 5000 --json

A private PostgreSQL with default durability, some worker processes with short leases, producers and
a canceller; backends are terminated, workers killed, stopped beyond their lease and drained, and the
server crashes once. When everything has ended, two records are compared that know nothing of each
other: the rows, read with SQL of this package's own, and what handlers, producers and disturbers wrote
about themselves, each process into an append-only file.

plan          the options, and the times that everybody agrees on
journal       those files: one line is one write
workload      the kinds of jobs and their handlers
worker        the worker process
server        the private PostgreSQL, which can crash and come back
fleet         the worker processes as seen from outside: kept running, killed, stopped, drained
producers     enqueues in every form, some rolled back; cancels
disturbers    who disturbs what, and when
history       both records in one place, as data
evidence      what the two records say together
checks        what must hold; pure, tested with made-up histories
run           one run from start to findings
mutants       wrong variants of the runtime that a run must notice
"""
