"""A durable job queue on PostgreSQL for Trio programs."""
