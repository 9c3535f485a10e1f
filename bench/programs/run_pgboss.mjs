// pg-boss as measured: node run_pgboss.mjs ORDER; the database comes from PG* variables.
import { PgBoss } from 'pg-boss'
import { end, handled, order, produce, say, waitForStart } from './wire.mjs'

const { queue = {}, boss: constructor = {}, work: options = {} } = order.config
const boss = new PgBoss({
  host: process.env.PGHOST,
  port: Number(process.env.PGPORT),
  user: process.env.PGUSER,
  database: process.env.PGDATABASE,
  ...constructor
})
boss.on('error', error => { throw error })

async function work () {
  await waitForStart()
  await boss.start()
  await boss.work('bench', options, async jobs => {
    for (const job of jobs) order.measure === 'latency' ? handled.oneSentAt(job.data.at) : handled.one()
  })
  say({ open: true })
  await end
  await boss.stop({ graceful: true })
  handled.sayAll()
}

async function send () {
  await boss.start()
  await produce(
    payload => boss.send('bench', payload),
    payloads => boss.insert('bench', payloads.map(data => ({ data })))
  )
  await boss.stop()
}

if (order.do === 'prepare') {
  await boss.start()
  await boss.createQueue('bench', queue)
  await boss.stop()
} else if (order.do === 'work') await work()
else await send()
