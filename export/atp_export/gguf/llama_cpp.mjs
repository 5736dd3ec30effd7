// llama.cpp, asked by JSON on stdin, through the node-llama-cpp of the working folder.
//
// {file, texts: [string], prompts: [[id]], new, blocks: [[id]], ends: [id], context}
// -> {release, ids: [[id]] of texts, tokens: [[id]] greedy after prompts, token_ms: of a greedy
//     token, nats: [number] of each block's tokens but its first, ended: [whether a text ends at
//     each of the ends], first: whether it puts a first token}
import { createRequire } from "node:module";

const require = createRequire(process.cwd() + "/");
const { getLlama } = await import(require.resolve("node-llama-cpp"));
let said = "";
for await (const part of process.stdin.setEncoding("utf8")) said += part;
const asked = JSON.parse(said);
const llama = await getLlama({ gpu: false, build: "never", maxThreads: asked.threads, logLevel: "error" });
const model = await llama.loadModel({ modelPath: asked.file });
const context = await model.createContext({
  contextSize: asked.context, threads: asked.threads, batchSize: 128,
});
const sequence = context.getSequence();

const ids = asked.texts.map((text) => model.tokenize(text, true));
const tokens = [];
const times = [];
for (const prompt of asked.prompts) {
  await sequence.clearHistory();
  const made = [];
  let began = performance.now();
  for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    if (made.length) times.push(performance.now() - began);
    began = performance.now();
    made.push(token);
    if (made.length >= asked.new) break;
  }
  tokens.push(made);
}
const nats = [];
for (const block of asked.blocks) {
  await sequence.clearHistory();
  const items = block.map((token, i) => i + 1 === block.length ? token : [token, { generateNext: {
    logits: { filter: { tokens: [block[i + 1]], includeTop: 1 } },
    totalLogitWeight: true,
  } }]);
  let lost = 0;
  const found = await sequence.controlledEvaluate(items);
  for (let i = 0; i + 1 < block.length; i++) {
    const { logits, totalLogitWeight } = found[i].next;
    const best = Math.max(...logits.values());
    lost += best + Math.log(totalLogitWeight) - logits.get(block[i + 1]);
  }
  nats.push(lost);
}
times.sort((a, b) => a - b);
const answer = JSON.stringify({
  release: llama.llamaCppRelease.release, ids, tokens, nats,
  ended: asked.ends.map((token) => model.isEogToken(token)),
  first: model.tokens.shouldPrependBosToken,
  token_ms: times[Math.floor(times.length / 2)] ?? null,
});
process.stdout.write(answer + "\n", () => process.exit(0));
