"""asyncpg in transaction mode, with its cache of named statements as it comes."""
import asyncio
import os

import asyncpg


async def work(number):
    conn = await asyncpg.connect(
        host="127.0.0.1", port=int(os.environ["PORT"]), user="app", password=os.environ["PASSWORD"],
        database=os.environ["DATABASE"],
    )
    try:
        for i in range(150):
            assert await conn.fetchval(f"SELECT $1::int + {i % 120}", number) == number + i % 120
        prepared = await conn.prepare("SELECT $1::text || 'x'")
        for i in range(10):
            assert await prepared.fetchval(str(i)) == f"{i}x"
        async with conn.transaction():
            await conn.execute("SELECT set_config('app.tenant', $1, true)", str(number))
            assert await conn.fetchval("SELECT current_setting('app.tenant')") == str(number)
            assert [row[0] async for row in conn.cursor("SELECT generate_series(1, 200)")] == list(range(1, 201))
        try:
            await conn.fetchval("SELECT 1 / $1::int", 0)
            raise AssertionError("division by zero is an error")
        except asyncpg.DivisionByZeroError:
            pass
        await conn.executemany("SELECT $1::int", [(i,) for i in range(100)])
        # What pools of this driver do between two users: a query that resets, and drops no statement.
        await conn.reset()
        assert await prepared.fetchval("again") == "againx"
    finally:
        await conn.close()


async def main():
    await asyncio.gather(*(work(number) for number in range(12)))
    print("done")


asyncio.run(main())
