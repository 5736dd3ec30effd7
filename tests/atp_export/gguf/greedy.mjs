// node greedy.mjs '{"file", "prompts": [[ids]], "new"}': llama.cpp's greedy tokens, a JSON list.
import { createRequire } from "node:module";

const require = createRequire(process.cwd() + "/");
const { getLlama } = await import(require.resolve("node-llama-cpp"));
const asked = JSON.parse(process.argv[2]);
const llama = await getLlama({ gpu: false, build: "never", maxThreads: 2, logLevel: "error" });
const model = await llama.loadModel({ modelPath: asked.file });
const context = await model.createContext({ contextSize: 256, threads: 2, batchSize: 64 });
const sequence = context.getSequence();
const found = [];
for (const prompt of asked.prompts) {
  await sequence.clearHistory();
  const made = [];
  for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    made.push(token);
    if (made.length >= asked.new) break;
  }
  found.push(made);
}
console.log(JSON.stringify(found));
process.exit(0);
