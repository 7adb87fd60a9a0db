//! Prefill in one process, decode in another: the quantized cache travels over a loopback socket, and the tokens are those that
//! one process alone would have decoded.
//!
//! `cargo run --release -p longkv-engine --example two_processes`

use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use longkv_engine::generate::argmax;
use longkv_engine::kv::{Geometry, Hack, HackOptions, KvCache};
use longkv_engine::mode::Mode;
use longkv_engine::{Error, Model};

const PROMPT: &[u8] = b"def merge(first, second):\n    \"\"\"Merge two sorted lists.\"\"\"\n    result = []\n    i = 0\n    j = 0\n    while i < len(first) and j < len(second):\n";
const DECODED: usize = 64;
const CAPACITY: usize = 512;
const TAG: u64 = 7;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    match std::env::args().nth(1) {
        Some(address) => decode_node(&address),
        None => prefill_node(),
    }
}

/// The model and an empty cache; both processes load the same.
fn open() -> Result<(Model, Hack), Error> {
    let model = Model::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("model"), &"dense".parse()?)?;
    let mode: Mode = "hack4".parse()?;
    let cache = Hack::new(&Geometry::new(model.config(), CAPACITY)?, &HackOptions::new(&mode, 4)?)?;
    Ok((model, cache))
}

fn prefill(model: &Model, cache: &mut Hack) -> Result<u32, Error> {
    let prompt: Vec<u32> = PROMPT.iter().map(|&byte| byte.into()).collect();
    let hidden = model.forward(&prompt, 0, cache)?;
    let logits = model.logits(hidden.view())?;
    Ok(argmax(logits.row(prompt.len() - 1)))
}

/// Greedy decoding from the first token on.
fn decode(model: &Model, cache: &mut Hack, mut token: u32) -> Result<Vec<u8>, Error> {
    let mut text = vec![token as u8];
    for _ in 1..DECODED {
        let hidden = model.forward(&[token], cache.len(), cache)?;
        token = argmax(model.logits(hidden.view())?.row(0));
        text.push(token as u8);
    }
    Ok(text)
}

fn prefill_node() -> Result<(), Box<dyn std::error::Error>> {
    let (model, mut cache) = open()?;
    let first = prefill(&model, &mut cache)?;

    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut child = Command::new(std::env::current_exe()?).arg(listener.local_addr()?.to_string()).spawn()?;
    let (mut socket, _) = listener.accept()?;
    // The first token comes from the prefill node, then the cache.
    socket.write_all(&first.to_le_bytes())?;
    let begin = std::time::Instant::now();
    let bytes = cache.send(&mut socket, TAG)?;
    socket.shutdown(std::net::Shutdown::Write)?;
    let mut remote = Vec::new();
    let time = begin.elapsed();
    socket.read_to_end(&mut remote)?;
    if !child.wait()?.success() {
        return Err("the decode node failed".into());
    }

    let local = decode(&model, &mut cache, first)?;
    println!("{} tokens sent as {bytes} bytes of keys and values in {time:.1?}", PROMPT.len());
    println!("one process:   {:?}", String::from_utf8_lossy(&local));
    println!("two processes: {:?}", String::from_utf8_lossy(&remote));
    if local != remote {
        return Err("the decode node found other tokens".into());
    }
    Ok(())
}

fn decode_node(address: &str) -> Result<(), Box<dyn std::error::Error>> {
    let (model, mut cache) = open()?;
    let mut socket = TcpStream::connect(address)?;
    let mut first = [0; 4];
    let mut reader = BufReader::new(socket.try_clone()?);
    reader.read_exact(&mut first)?;
    cache.receive(&mut reader, TAG, CAPACITY - DECODED)?;
    socket.write_all(&decode(&model, &mut cache, u32::from_le_bytes(first))?)?;
    Ok(())
}
