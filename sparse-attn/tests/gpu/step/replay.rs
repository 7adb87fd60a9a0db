//! One recorded step, replayed: lengths, budgets and tables change in device memory.

use super::*;

#[test]
fn emulator() {
    emulator::emulator_or_skip!();
    for order in [Order::Forward, Order::Random(1)] {
        replays_equal_single_steps(&EmulatorRig::new(order));
    }
}

#[test]
fn gpu() {
    if let Some(rig) = gpu_or_skip("step::replay") {
        replays_equal_single_steps(&rig.on_own_stream().expect("streams of its own"));
    }
}

fn replays_equal_single_steps<R: Rig>(rig: &R) {
    const STEPS: usize = 8;
    let text = Text::new(7);
    let start = 200; // with pages to miss, and one that is closed on the way
    let layers = [Layer::new(rig), Layer::new(rig)];
    let tokens = text.tokens(0..start);
    let (mut k, mut v) = (vec![f16::ZERO; REQUESTS * PROMPT * KV_HEADS * DIM], Vec::new());
    let at = (PROMPT - start) * KV_HEADS * DIM;
    k[at..][..tokens.k.len()].copy_from_slice(&halves(tokens.k));
    v.clone_from(&k);
    let lens = rig.upload(&[start as u32, 0, 0]);
    layers.iter().for_each(|layer| layer.prompt(&rig.upload(&k), &rig.upload(&v), &lens));

    let budget = rig.upload(&layers[0].budget());
    let input = |token: usize| {
        let pad = |values: &[f32]| [halves(values), vec![f16::ZERO; 2 * values.len()]].concat();
        let tokens = text.tokens(token..token + 1);
        [pad(text.queries(token).q), pad(tokens.k), pad(tokens.v)]
    };
    let [q, k, v] = input(start).map(|values| RefCell::new(rig.upload(&values)));
    let kv_len = RefCell::new(rig.upload(&[start as u32 + 1, 0, 0]));
    let replay = rig.record(Box::new(|| {
        layers[0].run(&q.borrow(), [&k.borrow(), &v.borrow()], &kv_len.borrow(), &budget);
    }));
    for step in 0..STEPS {
        let inputs = input(start + step);
        let len = [(start + step + 1) as u32, 0, 0];
        for (buffer, values) in [&q, &k, &v].into_iter().zip(&inputs) {
            rig.write(&mut buffer.borrow_mut(), 0, values);
        }
        rig.write(&mut kv_len.borrow_mut(), 0, &len);
        replay();
        let [q, k, v] = inputs.map(|values| rig.upload(&values));
        layers[1].run(&q, [&k, &v], &rig.upload(&len), &budget);
        let name = format!("step {step} on {}", rig.name());
        assert_eq!(layers[0].tables(), layers[1].tables(), "{name}");
        let [a, b] = layers.each_ref().map(|layer| rig.download(&layer.out.borrow()));
        assert!(a == b, "{name}: out");
        assert_eq!((layers[0].fault(), layers[1].fault()), (None, None), "{name}");
    }
    let counts: SparseCounts = bytemuck::cast_slice(&layers[0].tables().counts[..8])[0];
    assert!(counts.misses > 0 && counts.written > 12, "{counts:?}");
}
