"""SQLAlchemy: pools with pre-ping over psycopg and asyncpg, ORM-like units of work, settings made at connect."""

import asyncio

from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import create_async_engine

from suspending import URL, suspend


def sync():
    url = URL.replace("postgres://", "postgresql+psycopg://", 1)
    engine = create_engine(url, pool_size=3, max_overflow=0, pool_pre_ping=True)

    @event.listens_for(engine, "connect")
    def settings(connection, _):
        connection.execute("set timezone = 'Asia/Tokyo'")
        connection.commit()

    with engine.begin() as c:
        c.execute(text("create table s (id serial primary key, t text)"))
    for n in range(3):
        with engine.begin() as one, engine.connect() as two:
            assert one.execute(text("insert into s (t) values (:t) returning id"), {"t": "x"}).scalar() == n + 1
            assert two.execute(text("select count(*) from s")).scalar() == n
            assert two.execute(text("show timezone")).scalar() == "Asia/Tokyo"
        suspend()
    # The pool never had to open a third connection in place of one that its ping found broken.
    assert engine.pool.checkedin() == 2
    engine.dispose()


async def concurrent():
    # asyncpg takes no libpq options from a URL of SQLAlchemy's.
    base = URL.split("?")[0].replace("postgres://", "postgresql+asyncpg://", 1)
    url = base + "@prod--shop"
    engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_pre_ping=True)
    for n in range(3):
        async with engine.begin() as c:
            assert (await c.execute(text("select count(*) from s where t = :t"), {"t": "x"})).scalar() == 3
        suspend()
    await engine.dispose()


sync()
asyncio.run(concurrent())
print("ok")
