// graphile-worker as measured: node run_graphile.mjs ORDER; the database comes from PG* variables.
import { Logger, makeWorkerUtils, run, runMigrations } from 'graphile-worker'
import { end, handled, order, produce, say, waitForStart } from './wire.mjs'

const logger = new Logger(() => () => {}) // its default logger writes two lines a job to the console
const preset = { worker: { logger, ...order.config } }

async function work () {
  const taskList = {
    bench: async payload => order.measure === 'latency' ? handled.oneSentAt(payload.at) : handled.one()
  }
  await waitForStart()
  const runner = await run({ preset, logger, taskList, noHandleSignals: true })
  say({ open: true })
  await end
  await runner.stop()
  handled.sayAll()
}

async function send () {
  const utils = await makeWorkerUtils({ preset, logger })
  await produce(
    payload => utils.addJob('bench', payload),
    payloads => utils.addJobs(payloads.map(payload => ({ identifier: 'bench', payload })))
  )
  await utils.release()
}

if (order.do === 'prepare') await runMigrations({ preset, logger })
else if (order.do === 'work') await work()
else await send()
