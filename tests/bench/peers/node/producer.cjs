// The plainest producer in Node: fastify and amqplib, one process, one channel. Like our producer, it answers a callback
// only when the quorum queue has confirmed every id.
//
// AMQP_URI and QUEUE_NAME say where the messages go. scripts/bench installs the packages and sets NODE_PATH.
const amqp = require('amqplib')
const fastify = require('fastify')()

async function main() {
  const connection = await amqp.connect(process.env.AMQP_URI)
  const channel = await connection.createConfirmChannel()
  const queue = process.env.QUEUE_NAME
  await channel.assertQueue(queue, { durable: true, arguments: { 'x-queue-type': 'quorum' } })

  const publish = (id) =>
    new Promise((resolve, reject) => {
      const body = Buffer.from(JSON.stringify({ id }))
      const settle = (error) => (error ? reject(error) : resolve())
      channel.sendToQueue(queue, body, { persistent: true, contentType: 'application/json' }, settle)
    })

  fastify.post('/callback', async (request) => {
    const ids = request.body.object_ids
    await Promise.all(ids.map(publish))
    return { accepted: ids.length }
  })
  await fastify.listen({ host: '127.0.0.1', port: 0 })
  const { address, port } = fastify.server.address()
  console.log(`accepting callbacks address=${address}:${port}`)
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
