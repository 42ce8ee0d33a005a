//! The crash lab: a branch under load is killed, cut off from its power, or given a broken disk, again and again; whatever
//! was acknowledged must be there, and Postgres must find nothing wrong. `docs/testing.md` tells how to run it for long.

mod disk_faults;
mod kills;
mod lab;
mod power;
mod regress;
