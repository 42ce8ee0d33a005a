"""asyncpg: its statement cache, prepared statements, pool with reset, type codecs and settings live through suspends."""

import asyncio
import json

import asyncpg

from suspending import URL, suspend


async def main():
    pool = await asyncpg.create_pool(URL, min_size=2, max_size=2, server_settings={"timezone": "Asia/Tokyo"})
    async with pool.acquire() as c:
        await c.execute("create type mood as enum ('calm', 'loud'); create table t (n int, doc jsonb, m mood)")
    first, second = await pool.acquire(), await pool.acquire()
    for c in (first, second):
        await c.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
        await c.execute("set search_path = public, pg_catalog")
    kept = await first.prepare("select count(*) from t where n >= $1 and m = $2")
    for n in range(4):
        # Cached statements of the driver, with parameters of types it has looked up.
        await first.execute("insert into t values ($1, $2, $3)", n, {"n": n}, "loud")
        await second.executemany("update t set doc = $2 where n = $1", [(n, {"n": n + 1}), (-1, {})])
        assert await kept.fetchval(0, "loud") == n + 1
        assert await first.fetchval("select doc from t where n = $1", n) == {"n": n + 1}
        assert await second.fetchval("show timezone") == "Asia/Tokyo"
        assert await second.fetchval("show search_path") == "public, pg_catalog"
        async with first.transaction():
            rows = [row async for row in first.cursor("select n from t order by n", prefetch=1)]
        assert [row["n"] for row in rows] == list(range(n + 1))
        suspend()
    await pool.release(first)
    await pool.release(second)
    suspend()
    async with pool.acquire() as c:
        # Released, the connections were reset; what the pool gave them at the start stays.
        assert await c.fetchval("show timezone") == "Asia/Tokyo"
        assert await c.fetchval("show search_path") == '"$user", public'
        await c.copy_records_to_table("t", records=[(9,)], columns=["n"])
    await pool.close()


asyncio.run(main())
print("ok")
