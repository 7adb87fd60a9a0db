//! Every step equals the cache. On a GPU what crosses the link runs on a stream of its own.

use super::*;

#[test]
fn emulator() {
    emulator::emulator_or_skip!();
    for order in Order::ALL {
        drive(&EmulatorRig::new(order));
    }
}

#[test]
fn gpu() {
    if let Some(rig) = gpu_or_skip("step::trace") {
        drive(&rig.on_own_stream().expect("streams of its own"));
    }
}

fn drive<R: Rig>(rig: &R) {
    const STEPS: usize = 34;
    // A long prompt, a short one that becomes too long for the budget on the way, and a place without a request.
    let prompts = [PROMPT, 86];
    let texts = [Text::new(1), Text::new(2)];
    let plan = Plan::new(&config(), &[spec()]).unwrap();
    let mut cache = Cache::<f16>::new(plan.clone(), Capacity::of_requests(&plan, 2, MAX_TOKENS)).unwrap();
    let ids: Vec<RequestId> = (0..2).map(|_| cache.try_admit().unwrap()).collect();
    let layer = Layer::new(rig);
    assert_eq!(cache.lru(ids[0], 0, 0).unwrap().slots(), layer.plan.config().extent.slots);

    let (mut k, mut v) = (vec![f16::NAN; REQUESTS * PROMPT * KV_HEADS * DIM], Vec::new());
    v.clone_from(&k);
    for (request, (text, &len)) in texts.iter().zip(&prompts).enumerate() {
        let tokens = text.tokens(0..len);
        let (mut out, mut lse) = (vec![0.0; len * Q_HEADS * DIM], vec![0.0; len * Q_HEADS]);
        let queries = Queries { q: &text.q[..len * Q_HEADS * DIM], q_unrotated: None };
        cache.prefill(ids[request], 0, &queries, &tokens, &mut out, &mut lse).unwrap();
        // Aligned to the end.
        let at = ((request + 1) * PROMPT - len) * KV_HEADS * DIM;
        k[at..][..tokens.k.len()].copy_from_slice(&halves(tokens.k));
        v[at..][..tokens.v.len()].copy_from_slice(&halves(tokens.v));
    }
    let lens = |step: usize| [(prompts[0] + step) as u32, (prompts[1] + step) as u32, 0];
    layer.prompt(&rig.upload(&k), &rig.upload(&v), &rig.upload(&lens(0)));
    compare(&format!("prompts on {}", rig.name()), &layer, &mut cache, &ids);

    let budget = rig.upload(&layer.budget());
    for step in 0..STEPS {
        let name = format!("step {step} on {}", rig.name());
        let mut q = vec![f16::NAN; REQUESTS * Q_HEADS * DIM];
        let (mut k, mut v) = (vec![f16::NAN; REQUESTS * KV_HEADS * DIM], Vec::new());
        v.clone_from(&k);
        let (mut expected, mut expected_lse) = (Vec::new(), Vec::new());
        let mut dense = Vec::new();
        for (request, (text, &len)) in texts.iter().zip(&prompts).enumerate() {
            let (tokens, queries) = (text.tokens(len + step..len + step + 1), text.queries(len + step));
            q[request * Q_HEADS * DIM..][..Q_HEADS * DIM].copy_from_slice(&halves(queries.q));
            k[request * KV_HEADS * DIM..][..KV_HEADS * DIM].copy_from_slice(&halves(tokens.k));
            v[request * KV_HEADS * DIM..][..KV_HEADS * DIM].copy_from_slice(&halves(tokens.v));
            let (mut out, mut lse) = (vec![0.0; Q_HEADS * DIM], vec![0.0; Q_HEADS]);
            cache.decode(ids[request], 0, &queries, &tokens, &mut out, &mut lse).unwrap();
            dense.push(cache.is_dense(ids[request], 0).unwrap());
            expected.extend(out);
            expected_lse.extend(lse);
        }
        assert_eq!(dense, [false, step < 10], "{name}");
        let (q, k, v) = (rig.upload(&q), rig.upload(&k), rig.upload(&v));
        layer.run(&q, [&k, &v], &rig.upload(&lens(step + 1)), &budget);
        // The cache writes pages back when the next step begins.
        ids.iter().for_each(|&id| cache.write_back(id, 0).unwrap());
        compare(&name, &layer, &mut cache, &ids);
        let (out, lse) = (rig.download(&layer.out.borrow()), rig.download(&layer.lse.borrow()));
        for (i, (&found, &expected)) in out.iter().zip(&expected).enumerate() {
            let (found, allowed) = (found.to_f32(), 2e-3 + 2e-3 * expected.abs());
            assert!((found - expected).abs() <= allowed, "{name}: out {i} is {found}, not {expected}");
        }
        for (i, (&found, &expected)) in lse.iter().zip(&expected_lse).enumerate() {
            assert!((found - expected).abs() <= 1e-3, "{name}: lse {i} is {found}, not {expected}");
        }
        assert!(out[2 * Q_HEADS * DIM..].iter().all(|&x| x == f16::ZERO), "{name}: nobody's output");
        assert_eq!(lse[2 * Q_HEADS..], [f32::NEG_INFINITY; Q_HEADS], "{name}: nobody's lse");

        if step % 4 == 3 {
            for (text, (&id, &len)) in texts.iter().zip(ids.iter().zip(&prompts)) {
                let selection = cache.select(id, 0, &text.queries(len + step + 1)).unwrap();
                cache.prefetch(id, &selection).unwrap();
            }
            let mut q = vec![f16::NAN; REQUESTS * Q_HEADS * DIM];
            for (request, (text, &len)) in texts.iter().zip(&prompts).enumerate() {
                let queries = halves(text.queries(len + step + 1).q);
                q[request * Q_HEADS * DIM..][..Q_HEADS * DIM].copy_from_slice(&queries);
            }
            layer.prefetch(&rig.upload(&q), &budget);
            compare(&format!("prefetch after {name}"), &layer, &mut cache, &ids);
        }
    }
    let counters = cache.counters();
    assert!(counters.hits > 0 && counters.misses > 0 && counters.evicted > 0, "{counters:?}");
    assert!(counters.prefetched > 0 && counters.dense_steps > 0, "{counters:?}");
    let mut workspace = layer.workspace.borrow_mut();
    assert!(rig.counters_are_zero(&mut workspace, layer.plan.workspace()), "on {}", rig.name());
}
