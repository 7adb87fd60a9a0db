//! thin
use longkv_engine::*;
fn main() {
    let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/model"));
    let m = Model::load(path, &"dense".parse().unwrap()).unwrap();
    let t = tokenizer::Tokenizer::read(path, m.config()).unwrap();
    let kv: mode::Mode = std::env::args().nth(1).unwrap_or("dense".into()).parse().unwrap();
    let ctx: usize = std::env::args().nth(2).map_or(1024, |s| s.parse().unwrap());
    let mut s = Session::new(&m, &kv, Box::new(ranks::Single), ctx).unwrap();
    let text = t.encode(&std::fs::read(path.join("heldout.txt")).unwrap()).unwrap();
    let r =
        eval::evaluate(&mut s, "x", &text, eval::Windows::new(ctx, ctx / 4, 2).unwrap(), |_, _| {}).unwrap();
    println!("{r:?}");
    for c in [48, 128, 256, 512, 1024, 2048] {
        let mut s = Session::new(&m, &kv, Box::new(ranks::Single), c).unwrap();
        let q = retrieval::Questions { context: c, documents: 8, seed: 1 };
        println!("{:?}", retrieval::retrieve(&mut s, "x", &t, q, |_, _| {}).unwrap());
    }
    let mut s = Session::new(&m, &kv, Box::new(ranks::Single), 512).unwrap();
    let mut st = t.stream();
    generate::generate::<Error>(
        &mut s,
        &t.encode(b"def merge(a, b):\n").unwrap(),
        300,
        &mut generate::Sampler::new(0.6, 1).unwrap(),
        |x| {
            print!("{}", String::from_utf8_lossy(&st.push(x)?));
            Ok(())
        },
    )
    .unwrap();
}
