"""psycopg 3: every statement prepared at once, server-side cursors, pipelines, a pool that checks its connections."""

import psycopg
from psycopg_pool import ConnectionPool

from suspending import URL, suspend, wakes

with psycopg.connect(URL, prepare_threshold=0, autocommit=True) as c:
    c.execute("set role app")
    c.execute("set timezone = 'Asia/Tokyo'")
    c.execute("create table t (n int, t text)")
    for n in range(4):
        c.execute("insert into t values (%s, %s)", (n, "note"))
        assert c.execute("select count(*) from t where n <= %s", (n,)).fetchone()[0] == n + 1
        assert c.execute("show timezone").fetchone()[0] == "Asia/Tokyo"
        with c.pipeline():
            ones = [c.execute("select %s + 1", (i,)) for i in range(5)]
        assert [one.fetchone()[0] for one in ones] == [1, 2, 3, 4, 5]
        with c.transaction(), c.cursor("named") as named:
            named.execute("select n from t order by n")
            assert len(named.fetchall()) == n + 1
        with c.cursor().copy("copy t from stdin") as copy:
            copy.write_row((100 + n, None))
        c.execute("delete from t where n >= 100")
        suspend()
    # Binary results come by other statements.
    assert c.execute("select n from t where n = %s", (3,), binary=True).fetchone() == (3,)

with ConnectionPool(URL, min_size=2, max_size=2, check=ConnectionPool.check_connection, open=True) as pool:
    pool.wait()
    for n in range(2):
        with pool.connection() as c:
            assert c.execute("select count(*) from t").fetchone()[0] == 4
        suspend()
        woken = wakes()
        # An empty query is what this pool asks before it hands a connection out.
        with pool.connection() as c:
            assert wakes() == woken
            c.execute("select 1")
        assert wakes() == woken + 1
print("ok")
