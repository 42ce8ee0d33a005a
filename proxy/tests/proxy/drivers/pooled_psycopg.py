"""psycopg 3 in transaction mode: everything prepared, more statements than its cache has room for."""
import os
import threading

import psycopg

DSN = os.environ["DSN"]


def work(number, failures):
    try:
        with psycopg.connect(DSN, prepare_threshold=0) as conn:
            conn.prepared_max = 5
            conn.autocommit = True
            for i in range(60):
                # Statements beyond the fifth are given up by DEALLOCATE.
                row = conn.execute(f"SELECT %s::int + {i % 12}", [number]).fetchone()
                assert row == (number + i % 12,), row
            conn.autocommit = False
            with conn.transaction():
                conn.execute("SET LOCAL work_mem = '7MB'")
                assert conn.execute("SHOW work_mem").fetchone() == ("7MB",)
                with conn.cursor(name="portal") as cursor:
                    cursor.execute("SELECT n FROM generate_series(1, 100) n")
                    assert len(cursor.fetchmany(10)) == 10
            try:
                with conn.transaction():
                    conn.execute("SELECT 1 / %s", [0])
                raise AssertionError("division by zero is an error")
            except psycopg.errors.DivisionByZero:
                pass
            with conn.pipeline():
                cursors = [conn.execute("SELECT %s::int", [i]) for i in range(50)]
                assert [cursor.fetchone()[0] for cursor in cursors] == list(range(50))
            conn.commit()
            with conn.cursor() as cursor, cursor.copy("COPY (SELECT generate_series(1, 1000)) TO STDOUT") as copy:
                assert sum(1 for _ in copy.rows()) == 1000
            conn.commit()
    except BaseException as error:  # noqa: BLE001 — told below
        failures.append(f"{number}: {error!r}")


failures = []
threads = [threading.Thread(target=work, args=(number, failures)) for number in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
print("done")
