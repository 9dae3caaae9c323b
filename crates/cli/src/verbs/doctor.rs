//! `anyformer doctor`: what this machine and this binary have.

use anyformer_kernels::instructions::Instructions;
use anyformer_lab::units::bytes;
use serde_json::{Value, json};

use crate::args::Global;
use crate::exit::Failure;
use crate::say::Say;
use crate::setup::{cores, device, start_threads};

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Prints what was found. Nothing is changed.
pub fn run(_: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let threads = start_threads(global, None)?;
    let [total, available] = memory();
    let gpu = gpu();
    let mpi = version("mpirun").or_else(|| version("mpiexec"));
    let counted = anyformer_kernels::memory::allocated() > 0;
    let value = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "processor": processor(),
        "cores": cores(),
        "threads": threads,
        "simd": simd(Instructions::best()),
        "memory_total_bytes": total,
        "memory_available_bytes": available,
        "gpu_compiled_in": anyformer_ops::has_gpu(),
        "gpu": gpu,
        "mpi": mpi,
        "allocator": if counted { "mimalloc, counted" } else { "the system's" },
        "token_mixers": anyformer_mixers::token_mixers().len(),
        "tasks": anyformer_data::tasks().len(),
    });
    say.result(&value, || {
        let size =
            |size: Option<u64>| size.map_or("unknown".to_string(), |size| bytes(size as f64));
        let text = |value: &Value| {
            value
                .as_str()
                .map_or(value.to_string(), ToString::to_string)
        };
        let lines = [
            (
                "anyformer",
                format!(
                    "{} on {} {}",
                    text(&value["version"]),
                    text(&value["os"]),
                    text(&value["arch"])
                ),
            ),
            ("processor", processor().unwrap_or("unknown".into())),
            ("cores", format!("{}, {threads} threads in use", cores())),
            ("SIMD", simd(Instructions::best()).to_string()),
            (
                "memory",
                format!("{} total, {} available", size(total), size(available)),
            ),
            ("GPU", gpu.clone()),
            (
                "MPI",
                mpi.clone()
                    .unwrap_or("no mpirun on PATH (only needed for more than one machine)".into()),
            ),
            ("allocator", text(&value["allocator"])),
            (
                "holds",
                format!(
                    "{} token mixers, {} tasks",
                    value["token_mixers"], value["tasks"]
                ),
            ),
        ];
        lines
            .map(|(name, what)| format!("{name:<10} {what}\n"))
            .concat()
    });
    Ok(())
}

/// Names of sets of vector instructions.
pub(crate) fn simd(most: Instructions) -> &'static str {
    match most {
        Instructions::Avx512 => "AVX-512",
        Instructions::Avx2 => "AVX2 + FMA",
        Instructions::Portable if cfg!(target_arch = "x86_64") => "SSE2 (slow: no AVX2)",
        Instructions::Portable if cfg!(target_arch = "aarch64") => "NEON",
        Instructions::Portable => "portable",
    }
}

/// Value of a line `key: value` of a file of the system.
fn field(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

pub(crate) fn processor() -> Option<String> {
    field("/proc/cpuinfo", "model name")
}

/// Total and available bytes of memory, where the system tells.
pub(crate) fn memory() -> [Option<u64>; 2] {
    ["MemTotal", "MemAvailable"].map(|key| {
        let value = field("/proc/meminfo", key)?;
        let kibibytes: u64 = value.split_whitespace().next()?.parse().ok()?;
        Some(kibibytes * 1024)
    })
}

fn gpu() -> String {
    if !anyformer_ops::has_gpu() {
        return "not compiled in (build with --features gpu)".to_string();
    }
    match device("gpu") {
        Ok(device) => format!("{device:?}"),
        Err(Failure::Input(error) | Failure::Broken(error)) => {
            format!("compiled in, none usable: {error}")
        }
        Err(Failure::Interrupted(why)) => why,
    }
}

/// First line of what `program --version` says, where it can be run.
fn version(program: &str) -> Option<String> {
    let said = std::process::Command::new(program)
        .arg("--version")
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    text.lines()
        .next()
        .map(|line| format!("{program}: {}", line.trim()))
}
