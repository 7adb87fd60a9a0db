//! Lists the kernels, probes the machine and compiles one kernel if NVRTC is there. Needs no GPU.
//!
//! `cargo run -p longkv-cuda --example quickstart`

use longkv_cuda::compile;
use longkv_cuda::nvrtc::Nvrtc;
use longkv_cuda::probe;
use longkv_cuda::table::{self, Arch};

fn main() -> Result<(), longkv_cuda::Error> {
    println!("Kernels:");
    for kernel in table::kernels() {
        let names: Vec<_> = kernel.constants.iter().map(|constant| constant.name).collect();
        println!(
            "  {:12} {:28} {:16} {} shipped rows of [{}]",
            kernel.group,
            kernel.name,
            kernel.arch.to_string(),
            kernel.rows.len(),
            names.join(", ")
        );
    }

    match probe::driver() {
        Ok(driver) => {
            println!("\nDriver for CUDA {}:", driver.version());
            for device in driver.devices() {
                println!("  {}: {}, {}, {} SMs", device.ordinal, device.name, device.arch, device.sm_count);
            }
        }
        Err(reason) => println!("\nNo GPU: {reason}"),
    }

    match Nvrtc::find() {
        Ok(nvrtc) => {
            let arch = Arch::new(8, 0);
            let mut shipped = table::shipped().filter(|(instance, _)| instance.kernel.arch.runs_on(arch));
            if let Some((instance, _)) = shipped.next() {
                let used = compile::resources(nvrtc, &instance, arch)?;
                println!("\nNVRTC {} compiles {} for {arch}: {used:?}", nvrtc.version(), instance.label());
            }
        }
        Err(reason) => println!("\nNo compiler: {reason}"),
    }
    Ok(())
}
