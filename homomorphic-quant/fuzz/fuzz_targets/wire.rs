//! Any bytes as a stream, and as a request: an error or a cache, never a panic or an unbounded allocation.
#![no_main]

use homomorphic_quant::wire::{Model, Receiver, Request};
use homomorphic_quant::{Bits, Cache, Capacity, Config, KvShape};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|stream: &[u8]| {
    let config = Config::new(Bits::Two, Bits::Four).with_partition(32).unwrap();
    let shape = KvShape { kv_heads: 2, qk_dim: 16, v_dim: 32 };
    let mut cache = Cache::new(&config, 0, shape, Capacity { blocks: 4, sequences: 1 }).unwrap();
    let model = Model { layers: 1, kv_heads: 2, qk_dim: 16, v_dim: 32 };
    let mut receiver = Receiver::new(1, model, &[&mut cache], 140).unwrap();
    let _ = receiver.receive(stream, &mut [&mut cache]);
    receiver.abort(&mut [&mut cache]).unwrap();
    assert_eq!(cache.usage().bytes(), 0);
    let _ = Request::read(stream, 64);
});
