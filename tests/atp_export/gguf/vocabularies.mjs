// llama.cpp's ids of texts by vocabularies alone, many files in one start: asked by JSON on stdin,
// [{file, texts: [string]}] -> [[id] of each text] of each file.
import { createRequire } from "node:module";

const require = createRequire(process.cwd() + "/");
const { getLlama } = await import(require.resolve("node-llama-cpp"));
let said = "";
for await (const part of process.stdin.setEncoding("utf8")) said += part;
const llama = await getLlama({ gpu: false, build: "never", maxThreads: 1, logLevel: "error" });
const answers = [];
for (const { file, texts } of JSON.parse(said)) {
  const model = await llama.loadModel({ modelPath: file, vocabOnly: true });
  answers.push(texts.map((text) => model.tokenize(text, true)));
  await model.dispose();
}
process.stdout.write(JSON.stringify(answers) + "\n", () => process.exit(0));
