"""Layer L2: synchronous SQL over psycopg only; one module per concern, no trio."""
