// node-postgres: named statements, which it never prepares twice on a connection, and its pool.
const { Client, Pool } = require('pg')
const assert = require('node:assert')
const [connectionString, api] = process.argv.slice(2)

async function suspend() {
  const answer = await fetch(`${api}/v1/projects/shop/branches/prod/compute/suspend`, {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: '{}',
  })
  assert.ok(answer.ok, await answer.text())
}

async function main() {
  const client = new Client({ connectionString })
  await client.connect()
  await client.query("set timezone = 'Asia/Tokyo'")
  await client.query('create table t (n int, doc jsonb)')
  const pool = new Pool({ connectionString, max: 3 })
  for (let n = 1; n <= 4; n++) {
    await client.query({ name: 'put', text: 'insert into t values ($1, $2)', values: [n, { n }] })
    const { rows } = await client.query({ name: 'count', text: 'select count(*)::int as n from t where n > $1', values: [0] })
    assert.strictEqual(rows[0].n, n)
    assert.strictEqual((await client.query('show timezone')).rows[0].TimeZone, 'Asia/Tokyo')
    const many = await Promise.all([1, 2, 3].map(i =>
      pool.query({ name: 'twice', text: 'select $1::int * 2 as n', values: [i] })))
    assert.deepStrictEqual(many.map(one => one.rows[0].n), [2, 4, 6])
    await suspend()
  }
  await pool.end()
  await client.end()
  console.log('ok')
}

main()
