// node-postgres in transaction mode: named statements, and a pool of its own in front.
const { Client, Pool } = require('pg');
const assert = require('node:assert');

const options = {
  host: '127.0.0.1', port: Number(process.env.PORT), user: 'app', password: process.env.PASSWORD,
  database: process.env.DATABASE,
};

async function work(number) {
  const client = new Client(options);
  await client.connect();
  for (let i = 0; i < 60; i++) {
    const query = { name: `add-${i % 7}`, text: `SELECT $1::int + ${i % 7} AS sum`, values: [number] };
    assert.strictEqual((await client.query(query)).rows[0].sum, number + i % 7);
  }
  await client.query('BEGIN');
  await client.query("SET LOCAL work_mem = '7MB'");
  assert.strictEqual((await client.query('SHOW work_mem')).rows[0].work_mem, '7MB');
  await client.query('COMMIT');
  await assert.rejects(client.query({ name: 'bad', text: 'SELECT 1 / $1::int', values: [0] }), { code: '22012' });
  await assert.rejects(client.query({ name: 'worse', text: 'SELECT broken', values: [] }), { code: '42703' });
  await client.end();
}

async function main() {
  await Promise.all(Array.from({ length: 12 }, (_, number) => work(number)));
  const pool = new Pool({ ...options, max: 10 });
  const queries = Array.from({ length: 200 }, (_, i) => pool.query({ name: 'one', text: 'SELECT $1::int AS i', values: [i] }));
  (await Promise.all(queries)).forEach((result, i) => assert.strictEqual(result.rows[0].i, i));
  await pool.end();
  console.log('done');
}

main().catch((error) => { console.error(error); process.exit(1); });
