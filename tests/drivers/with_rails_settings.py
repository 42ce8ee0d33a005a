"""What Rails' PostgreSQL adapter does to a connection, message by message: its SETs, its statements a1, a2 …, its ping `;`."""

import psycopg

from suspending import URL, suspend, wakes

with psycopg.connect(URL, autocommit=True) as c:
    for setting in [
        "SET client_min_messages TO 'warning'",
        "SET standard_conforming_strings = on",
        "SET intervalstyle = iso_8601",
        "SET SESSION timezone TO 'UTC'",
        "SET SESSION statement_timeout TO 15000",
        "SET search_path TO app, public",
        "SELECT set_config('app.tenant', '42', false)",
    ]:
        c.execute(setting)
    c.execute("CREATE SCHEMA app")
    c.execute("CREATE TABLE app.users (id bigserial PRIMARY KEY, name text)")
    pg = c.pgconn
    for name, sql in [
        (b"a1", b'SELECT "users".* FROM "users" WHERE "users"."id" = $1 LIMIT $2'),
        (b"a2", b'INSERT INTO "users" ("name") VALUES ($1) RETURNING "id"'),
    ]:
        assert pg.prepare(name, sql).status == psycopg.pq.ExecStatus.COMMAND_OK
    for n in range(1, 4):
        assert pg.exec_prepared(b"a2", [b"someone"]).get_value(0, 0) == str(n).encode()
        assert pg.exec_prepared(b"a1", [str(n).encode(), b"1"]).get_value(0, 1) == b"someone"
        assert c.execute("SHOW intervalstyle").fetchone()[0] == "iso_8601"
        assert c.execute("SHOW app.tenant").fetchone()[0] == "42"
        suspend()
        woken = wakes()
        assert pg.exec_(b";").status == psycopg.pq.ExecStatus.EMPTY_QUERY
        assert wakes() == woken
print("ok")
