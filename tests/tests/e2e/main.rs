//! End to end: the built binary, stock Postgres, psql, pgbench, tokio-postgres and psycopg.

mod access;
mod branches;
mod bucket_s3;
mod collect;
mod connections;
mod deploys;
mod diff;
mod docs;
mod drills;
mod drivers;
mod fsck;
mod handover;
mod import;
mod kills;
mod node_loss;
mod nodes;
mod outage;
mod points;
mod pooling;
mod postgres_life;
mod quick_start;
mod releases;
mod restore;
mod sessions;
mod sleep;
mod visits;
