//! Requests that come, go and fail beside others.

use super::*;

emulator::device_test!(faults_harm_their_row_alone, prompts_continue_beside_decoding_requests);

/// A host page out of range is zeros and a fault, a budget past the plan's selects nothing; the other rows do not notice.
fn faults_harm_their_row_alone<R: Rig>(rig: &R) {
    let text = Text::new(5);
    let extent = Layer::new(rig).plan.config().extent;
    let run = |host_page: Option<u32>, budget: Option<u32>| {
        // What others read must not even change how a row is split.
        let layer = Layer::with(rig, Splits::Fixed { tokens: 64 });
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for _ in 0..REQUESTS {
            k.extend(halves(text.tokens(0..PROMPT).k));
            v.extend(halves(text.tokens(0..PROMPT).v));
        }
        let lens = rig.upload(&[PROMPT as u32; REQUESTS]);
        layer.prompt(&rig.upload(&k), &rig.upload(&v), &lens);
        if let Some(page) = host_page {
            let at = extent.max_pages; // of request 1
            rig.write(&mut layer.host_table.borrow_mut(), at, &vec![page; extent.max_pages]);
        }
        let mut budgets = layer.budget();
        if let Some(budget) = budget {
            budgets[KV_HEADS] = budget; // of row 2, request 1
        }
        let q = halves(text.queries(PROMPT).q).repeat(REQUESTS);
        let (k, v) = (text.tokens(PROMPT..PROMPT + 1).k, text.tokens(PROMPT..PROMPT + 1).v);
        let (k, v) = (halves(k).repeat(REQUESTS), halves(v).repeat(REQUESTS));
        let lens = rig.upload(&[PROMPT as u32 + 1; REQUESTS]);
        let again = || {
            rig.write(&mut layer.status.borrow_mut(), 0, &[0u64]);
            layer.run(&rig.upload(&q), [&rig.upload(&k), &rig.upload(&v)], &lens, &rig.upload(&budgets));
            let bits: Vec<u16> = rig.download(&layer.out.borrow()).iter().map(|x| x.to_bits()).collect();
            (bits, rig.download(&layer.lse.borrow()), layer.fault())
        };
        let first = again();
        if let Some(fault) = first.2 {
            // What did not arrive is no hit the next time.
            let second = again();
            let name = format!("{host_page:?}, {budget:?} on {}", rig.name());
            assert_eq!(second.2.map(|fault| fault.code), Some(fault.code), "{name}: twice");
        }
        (first.0, first.1, first.2, layer.tables())
    };
    let name = format!("on {}", rig.name());
    let (good, _, fault, tables) = run(None, None);
    assert_eq!(fault, None, "{name}");
    let counts: SparseCounts = bytemuck::cast_slice(&tables.counts[..8])[0];
    assert!(counts.misses > 0, "{name}: {counts:?}");
    let of_request = Q_HEADS * DIM;
    let others = |out: &[u16]| [&out[..of_request], &out[2 * of_request..]].concat();
    for (case, host_page, budget, code) in [
        ("host page", Some(u32::MAX), None, FaultCode::BadPage),
        ("budget", None, Some(extent.max_selected as u32 + 1), FaultCode::BadLength),
    ] {
        let (out, lse, fault, after) = run(host_page, budget);
        let fault = fault.unwrap_or_else(|| panic!("{case} {name}: nothing reported"));
        assert_eq!(fault.code, code as u32, "{case} {name}");
        assert!((KV_HEADS..2 * KV_HEADS).contains(&(fault.index as usize)), "{case} {name}: {fault:?}");
        assert!(others(&out) == others(&good), "{case} {name}: others");
        let (row, group) = (fault.index as usize, Q_HEADS / KV_HEADS);
        let of_row = &out[row * group * DIM..][..group * DIM];
        assert!(of_row.iter().all(|&bits| f16::from_bits(bits) == f16::ZERO), "{case} {name}: not 0");
        assert_eq!(lse[row * group..][..group], [f32::NEG_INFINITY; 2], "{case} {name}");
        assert_eq!(after.check(&extent), None, "{case} {name}");
    }
}

/// A prompt goes on in parts while another request decodes: only the new tokens are written, and a request that has ended keeps
/// quiet whatever its tables hold.
fn prompts_continue_beside_decoding_requests<R: Rig>(rig: &R) {
    let text = Text::new(9);
    let plan = Plan::new(&config(), &[spec()]).unwrap();
    let mut cache = Cache::<f16>::new(plan.clone(), Capacity::of_requests(&plan, 2, MAX_TOKENS)).unwrap();
    let ids: Vec<RequestId> = (0..2).map(|_| cache.try_admit().unwrap()).collect();
    let layer = Layer::new(rig);
    let mut lens = [0usize; 2];
    // New tokens of each request: parts that end anywhere, after which a context becomes too long for the budget.
    for (number, new) in [[70, 40], [10, 0], [0, 17], [50, 60], [33, 0]].into_iter().enumerate() {
        let (mut k, mut v) = (vec![f16::NAN; REQUESTS * PROMPT * KV_HEADS * DIM], Vec::new());
        v.clone_from(&k);
        for request in 0..2 {
            let range = lens[request]..lens[request] + new[request];
            if range.is_empty() {
                continue;
            }
            let tokens = text.tokens(range.clone());
            let (mut out, mut lse) =
                (vec![0.0; range.len() * Q_HEADS * DIM], vec![0.0; range.len() * Q_HEADS]);
            let q = &text.q[range.start * Q_HEADS * DIM..range.end * Q_HEADS * DIM];
            let queries = Queries { q, q_unrotated: None };
            cache.prefill(ids[request], 0, &queries, &tokens, &mut out, &mut lse).unwrap();
            let at = ((request + 1) * PROMPT - range.len()) * KV_HEADS * DIM;
            k[at..][..tokens.k.len()].copy_from_slice(&halves(tokens.k));
            v[at..][..tokens.v.len()].copy_from_slice(&halves(tokens.v));
            lens[request] = range.end;
        }
        let new = rig.upload(&[new[0] as u32, new[1] as u32, 0]);
        let kv_len = rig.upload(&[lens[0] as u32, lens[1] as u32, 0]);
        layer.ragged_prompt(&rig.upload(&k), &rig.upload(&v), &kv_len, Some(&new));
        ids.iter().for_each(|&id| cache.write_back(id, 0).unwrap());
        compare(&format!("part {number} on {}", rig.name()), &layer, &mut cache, &ids);
    }
    // Request 1 has ended: its tables stay, and nothing of it changes or is read.
    let before = layer.tables();
    let (tokens, queries) = (text.tokens(lens[0]..lens[0] + 1), text.queries(lens[0]));
    let pad = |values: &[f32]| [halves(values), vec![f16::NAN; 2 * values.len()]].concat();
    let inputs = [pad(queries.q), pad(tokens.k), pad(tokens.v)].map(|values| rig.upload(&values));
    let kv_len = rig.upload(&[lens[0] as u32 + 1, 0, 0]);
    layer.run(&inputs[0], [&inputs[1], &inputs[2]], &kv_len, &rig.upload(&layer.budget()));
    let (after, name) = (layer.tables(), rig.name());
    assert_eq!(layer.fault(), None, "on {name}");
    let slots = layer.plan.config().extent.slots * KV_HEADS;
    assert_eq!(after.owners[slots..], before.owners[slots..], "owners on {name}");
    assert_eq!(after.ages[slots..], before.ages[slots..], "ages on {name}");
    assert_eq!(after.counts[KV_HEADS * 8..], before.counts[KV_HEADS * 8..], "counts on {name}");
    assert!(after.counts[..8] != before.counts[..8], "the other one goes on, on {name}");
    let out = rig.download(&layer.out.borrow());
    assert!(out[Q_HEADS * DIM..].iter().all(|&x| x == f16::ZERO), "out on {name}");
}
