"""One test for each row of the table of faults: real processes, real servers, real links.

A test is named after its row (`test_row_26_…`); `test_rows.py` checks that no row is missing. Where a
fault needs what not every machine allows (network namespaces, PgBouncer, libfaketime), the test says so
when it is skipped, or falls back to the fault proxy.
"""
