// Whether a prompt lies outside the domain that a slim model was made for (docs/gate.md).
import fs from "node:fs";
import path from "node:path";
import zlib from "node:zlib";

// The bytes of the arrays in an .npz: a zip (its central directory: PKWARE's APPNOTE 4.3.12) of .npy
// files (numpy's NEP 1, version 1.0).
function arrays(file) {
  const zip = fs.readFileSync(file);
  const end = zip.lastIndexOf(Buffer.from([0x50, 0x4b, 5, 6]));
  const found = {};
  let at = zip.readUInt32LE(end + 16);
  for (let left = zip.readUInt16LE(end + 10); left > 0; left--) {
    const [packed, local] = [zip.readUInt32LE(at + 20), zip.readUInt32LE(at + 42)];
    const [named, extra, comment] = [28, 30, 32].map((offset) => zip.readUInt16LE(at + offset));
    const name = zip.toString("utf8", at + 46, at + 46 + named);
    const start = local + 30 + zip.readUInt16LE(local + 26) + zip.readUInt16LE(local + 28);
    const npy = zlib.inflateRawSync(zip.subarray(start, start + packed));
    found[path.parse(name).name] = npy.subarray(10 + npy.readUInt16LE(8));
    at += 46 + named + extra + comment;
  }
  return found;
}

// In a run's folder it is of the run's own onnx/ alone.
function profileOf(folder) {
  const beside = path.dirname(path.resolve(folder));
  const foreign = fs.existsSync(path.join(beside, "config.toml")) && path.basename(folder) !== "onnx";
  const places = [folder, ...(foreign ? [] : [beside])].map((place) => path.join(place, "domain.npz"));
  return places.find((place) => fs.existsSync(place));
}

// ids: token ids. undefined where that cannot be told.
export function outside(folder, ids) {
  const file = profileOf(folder);
  if (file === undefined) return undefined;
  const { bits, lengths, thresholds } = arrays(file);
  let threshold;
  for (let i = 0; 8 * i < lengths.length; i++) {
    if (lengths.readBigInt64LE(8 * i) <= ids.length) threshold = thresholds.readDoubleLE(8 * i);
  }
  if (threshold === undefined) return undefined;
  let unknown = 0;
  for (let i = 1; i < ids.length; i++) {
    const mixed = BigInt(ids[i - 1]) * 0x9e3779b1n + BigInt(ids[i]) * 0x85ebca77n;
    const place = Number((mixed ^ (mixed >> 17n)) % BigInt(8 * bits.length));
    unknown += 1 - ((bits[place >> 3] >> (place & 7)) & 1);
  }
  return unknown / (ids.length - 1) > threshold;
}
