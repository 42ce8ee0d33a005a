//! The few things storage must know about files of Postgres: `PG_VERSION`, `pg_control`, and WAL segments.
