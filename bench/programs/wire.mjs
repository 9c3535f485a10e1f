// The JavaScript twin of wire.py.
import readline from 'node:readline'

export const order = JSON.parse(process.argv[2])

// CLOCK_MONOTONIC in seconds, as Python's time.monotonic().
export const now = () => Number(process.hrtime.bigint()) / 1e9

export function say (values) {
  process.stdout.write(JSON.stringify(values) + '\n')
}

const lines = readline.createInterface({ input: process.stdin })
const started = new Promise(resolve => lines.once('line', resolve))
export const end = new Promise(resolve => lines.once('close', resolve))

export async function waitForStart () {
  say({ ready: true })
  await started
}

export function payload (no) {
  const frame = { to: 'ada@example.com', no, text: '' }
  frame.text = 'x'.repeat(Math.max(0, order.size - JSON.stringify(frame).length))
  return frame
}

export const handled = {
  count: 0,
  latencies: [],
  one () {
    this.count += 1
    if (this.count === 1) say({ started: now() })
    if (this.count === order.jobs) say({ handled: now() })
  },
  oneSentAt (at) {
    this.latencies.push(now() - at)
    this.one()
  },
  sayAll () {
    say({ count: this.count, latencies: this.latencies })
  }
}

// What every producer does, given how to send one payload and how to send many.
export async function produce (sendOne, sendMany) {
  await waitForStart()
  const begun = now()
  if (order.do === 'bulk') {
    for (let no = 0; no < order.jobs; no += order.chunk) {
      const size = Math.min(order.chunk, order.jobs - no)
      await sendMany(Array.from({ length: size }, (_, i) => payload(no + i)))
    }
  } else if (order.do === 'single') {
    for (let no = 0; no < order.jobs; no++) await sendOne(payload(no))
  } else {
    for (let no = 0; no < order.jobs; no++) {
      const wait = (begun + no / order.rate - now()) * 1000
      await new Promise(resolve => setTimeout(resolve, Math.max(0, wait)))
      await sendOne({ ...payload(no), at: now() })
    }
  }
  say({ seconds: now() - begun })
}
