//! ONNX Runtime: the library loaded at run time, and graphs that carry a state per stream.

use std::borrow::Cow;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{Session, SessionInputValue};
use ort::value::{Outlet, TensorElementType, TensorRef, ValueType};

use crate::bundle::{Dimension, Element, Graph, Tensor};
use crate::codec::CodecError;

/// The one environment of the process: ONNX Runtime allows no second, and is never unloaded.
static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);

/// Loads `libonnxruntime.so`, the first time it is asked to; later calls give what the first successful one loaded.
///
/// # Errors
/// In words, with the path and what to do.
pub fn load(library: &Path) -> Result<Environment, String> {
    let mut environment = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(environment) = &*environment {
        return Ok(environment.clone());
    }
    let explain = |error: &dyn std::fmt::Display| {
        format!(
            "{}: {error}; run `make models`, or set the path of libonnxruntime.so (1.22 or later) right",
            library.display()
        )
    };
    let mut magic = [0; 4];
    fs::File::open(library)
        .and_then(|mut file| file.read_exact(&mut magic))
        .map_err(|error| explain(&error))?;
    if magic != *b"\x7fELF" {
        return Err(explain(&"not a shared library"));
    }
    let copy = PrivateCopy::of(library);
    let mapped = match &copy {
        Ok(copy) => ort::init_from(&copy.path)
            .map_err(|error| format!("its private copy can't be mapped ({error})")),
        Err(error) => Err(format!(
            "no private copy of it can be written to {} ({error})",
            std::env::temp_dir().display()
        )),
    };
    let builder = match mapped {
        Ok(builder) => builder,
        Err(why) => {
            let builder = ort::init_from(library).map_err(|error| explain(&error))?;
            // Not before it is mapped: where it can't be, the error says all, and every codec thread tries again.
            tracing::warn!(
                "{}: ONNX Runtime is used where it is, because {why}: whoever overwrites the file in place ends this process, and with it \
                 every call; a temporary folder (TMPDIR) that can be written to and isn't mounted noexec prevents that",
                library.display()
            );
            builder
        }
    };
    let made = builder
        .with_name("auralink")
        .with_telemetry(false)
        .with_logger(Arc::new(|level, category, _, _, message| match level {
            LogLevel::Error | LogLevel::Fatal => {
                tracing::warn!(target: "onnxruntime", category, "{message}");
            }
            _ => tracing::debug!(target: "onnxruntime", category, "{message}"),
        }))
        .build()
        .map_err(|error| explain(&error))?;
    // ort asks for every level, and each line would be formatted before our logger drops it.
    made.set_log_level(LogLevel::Error);
    *environment = Some(made.clone());
    Ok(made)
}

/// A copy of the library that nobody else can write to. Who overwrites a mapped library in place ends the process that runs it,
/// and with it every call; what is mapped from here stays as it was. The file is gone from the folder once it is loaded.
struct PrivateCopy {
    path: PathBuf,
}

impl PrivateCopy {
    fn of(library: &Path) -> io::Result<Self> {
        let name = format!(".auralink-onnxruntime-{}.so", std::process::id());
        let copy = Self {
            path: std::env::temp_dir().join(name),
        };
        // Left by an earlier process of the same number.
        let _ = fs::remove_file(&copy.path);
        let bytes = fs::read(library)?;
        fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o700)
            .open(&copy.path)?
            .write_all(&bytes)?;
        Ok(copy)
    }
}

impl Drop for PrivateCopy {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// One stream's part of a batch.
#[derive(Debug)]
pub struct Row<'a> {
    /// What goes in: one frame, or as many as every other row of the batch has, up to [`StatefulGraph::steps`].
    pub input: &'a [f32],
    /// The stream's state; all zeros at its beginning and again after an error.
    pub state: &'a mut [f32],
    /// What comes out.
    pub output: &'a mut [f32],
    /// Whether it did.
    pub done: Result<(), CodecError>,
}

/// Numbers of all the states of a stream together: 1 MiB. Thousands of streams are to fit.
const LARGEST_STATE: usize = 1 << 18;
/// Numbers of any other tensor of a stream.
const LARGEST_TENSOR: usize = 1 << 20;

/// Frames of a run, the most that any graph is given.
const MOST_STEPS: usize = 64;

/// Where the batch stands in a shape.
#[derive(Debug, Clone)]
struct Shape {
    sizes: Vec<usize>,
    batch: usize,
}

impl Shape {
    fn new(name: &str, dimensions: &[Dimension]) -> Result<Self, String> {
        let mut batch = None;
        let mut sizes = Vec::new();
        for (place, dimension) in dimensions.iter().enumerate() {
            match dimension {
                Dimension::Fixed(size) if (1..=LARGEST_STATE).contains(size) => sizes.push(*size),
                Dimension::Fixed(size) => return Err(format!("{name}.shape: a size of {size}")),
                Dimension::Batch(_) if batch.is_none() => {
                    batch = Some(place);
                    sizes.push(1);
                }
                Dimension::Batch(_) => return Err(format!("{name}.shape: two batch dimensions")),
            }
        }
        let batch = batch.ok_or_else(|| format!("{name}.shape: no batch dimension"))?;
        if sizes
            .iter()
            .try_fold(1usize, |a, b| a.checked_mul(*b))
            .is_none_or(|n| n > LARGEST_STATE)
        {
            return Err(format!(
                "{name}.shape: over {LARGEST_STATE} numbers a stream"
            ));
        }
        Ok(Self { sizes, batch })
    }

    /// Numbers of one stream.
    fn each(&self) -> usize {
        self.sizes.iter().product()
    }

    /// Numbers that lie together.
    fn run(&self) -> usize {
        self.sizes.iter().skip(self.batch + 1).product()
    }

    /// The same with so many frames one after another.
    fn times(&self, frames: usize) -> Self {
        let mut shape = self.clone();
        if let Some(last) = shape.sizes.last_mut() {
            *last *= frames;
        }
        shape
    }

    fn of(&self, streams: usize) -> Vec<i64> {
        let mut sizes: Vec<i64> = self.sizes.iter().map(|n| *n as i64).collect();
        if let Some(batch) = sizes.get_mut(self.batch) {
            *batch = streams as i64;
        }
        sizes
    }

    /// Copies a stream's numbers from or to their places in a batch.
    fn places(
        &self,
        stream: usize,
        streams: usize,
    ) -> impl Iterator<Item = std::ops::Range<usize>> {
        let run = self.run();
        (0..self.each() / run).map(move |part| {
            let start = (part * streams + stream) * run;
            start..start + run
        })
    }
}

/// A state's names and place.
#[derive(Debug)]
struct Held {
    input: String,
    output: String,
    shape: Shape,
    /// The batch's numbers, kept so that nothing is allocated for them.
    numbers: Vec<f32>,
}

/// A graph that takes an input and states and gives an output and the next states, for any number of streams at once. A stream's
/// states lie one after the other in the order of the manifest. Codes (i64) go in and come out as the `f32` of the same value:
/// they have 16 bits at most, which `f32` holds exactly.
#[derive(Debug)]
pub struct StatefulGraph {
    session: Session,
    graph: Graph,
    input: Shape,
    output: Shape,
    states: Vec<Held>,
    sample_rate: [i64; 1],
    /// Kept from batch to batch, so that nothing is allocated for them.
    inputs: Vec<f32>,
    codes: Vec<i64>,
}

impl StatefulGraph {
    /// Builds a session of one thread. `part` is the graph's key in the manifest.
    ///
    /// # Errors
    /// In words: the file isn't one that ONNX Runtime takes, or hasn't the inputs and outputs of the manifest.
    pub fn new(
        environment: &Environment,
        part: &str,
        graph: &Graph,
        model: &[u8],
        sample_rate: usize,
    ) -> Result<Self, String> {
        let explain = |error: String| format!("{}: {error}", graph.file);
        let session = session(environment, model).map_err(|error| explain(error.to_string()))?;
        let shape =
            |key: &str, dimensions: &[Dimension]| Shape::new(&format!("{part}.{key}"), dimensions);
        let large = |key: &str, tensor: &Tensor| {
            let shape = shape(key, &tensor.shape)?;
            if shape.each() > LARGEST_TENSOR {
                return Err(format!(
                    "{part}.{key}.shape: over {LARGEST_TENSOR} numbers a stream"
                ));
            }
            Ok(shape)
        };
        let (input, output) = (
            large("input", &graph.input)?,
            large("output", &graph.output)?,
        );
        let steps = graph.steps.unwrap_or(1);
        // A frame's numbers have to stand together: time is the last dimension, and nothing else but the batch goes before it.
        let open = |shape: &Shape| {
            let last = shape.sizes.last().copied().unwrap_or(0);
            steps == 1 || shape.batch + 1 < shape.sizes.len() && shape.each() == last
        };
        if !(1..=MOST_STEPS).contains(&steps) || !open(&input) || !open(&output) {
            return Err(format!(
                "{part}.steps: {steps}: 1 to {MOST_STEPS} frames go through at once, along the last dimension, and every other one but the batch has to be 1"
            ));
        }
        let (inputs, outputs) = (session.inputs(), session.outputs());
        let side = ("input", inputs);
        agrees(side, &graph.input.name, graph.input.dtype, &input).map_err(explain)?;
        let side = ("output", outputs);
        agrees(side, &graph.output.name, graph.output.dtype, &output).map_err(explain)?;
        let mut states = Vec::with_capacity(graph.state.len());
        for state in &graph.state {
            let shape = shape("state", &state.shape)?;
            agrees(("input", inputs), &state.input, Element::F32, &shape).map_err(explain)?;
            agrees(("output", outputs), &state.output, Element::F32, &shape).map_err(explain)?;
            states.push(Held {
                input: state.input.clone(),
                output: state.output.clone(),
                shape,
                numbers: Vec::new(),
            });
        }
        if states.iter().map(|state| state.shape.each()).sum::<usize>() > LARGEST_STATE {
            return Err(format!(
                "{part}.state: over {LARGEST_STATE} numbers a stream"
            ));
        }
        if let Some(name) = &graph.sample_rate_input
            && !inputs.iter().any(|outlet| outlet.name() == name)
        {
            return Err(explain(format!("the graph has no input {name}")));
        }
        let given = graph.state.iter().map(|state| &state.input);
        let given: Vec<&String> = given
            .chain([&graph.input.name])
            .chain(&graph.sample_rate_input)
            .collect();
        if let Some(other) = inputs
            .iter()
            .find(|outlet| given.iter().all(|name| *name != outlet.name()))
        {
            return Err(explain(format!(
                "the graph wants an input {}, which {part} doesn't name: a state has to be listed under state",
                other.name()
            )));
        }
        Ok(Self {
            input,
            output,
            states,
            session,
            graph: graph.clone(),
            sample_rate: [sample_rate as i64],
            inputs: Vec::new(),
            codes: Vec::new(),
        })
    }

    /// Frames of a stream that go through in one run at most.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.graph.steps.unwrap_or(1)
    }

    /// Numbers that go in for each frame of a stream.
    #[must_use]
    pub fn input_size(&self) -> usize {
        self.input.each()
    }

    /// Numbers that come out for each frame of a stream.
    #[must_use]
    pub fn output_size(&self) -> usize {
        self.output.each()
    }

    /// Numbers of each stream's states.
    #[must_use]
    pub fn state_size(&self) -> usize {
        self.states.iter().map(|state| state.shape.each()).sum()
    }

    /// Runs the graph once for all rows together. Where it fails, or a row's result is no number, the row's `done` says so, its
    /// output is zeros, and so is its state, lest it be poisoned.
    pub fn run(&mut self, rows: &mut [Row<'_>]) {
        let Some(first) = rows.first() else {
            return;
        };
        let steps = (first.input.len() / self.input_size()).clamp(1, self.steps());
        let sizes = (
            self.input_size() * steps,
            self.state_size(),
            self.output_size() * steps,
        );
        if rows
            .iter()
            .any(|r| (r.input.len(), r.state.len(), r.output.len()) != sizes)
        {
            return fail(rows, "a tensor of another size than the manifest's");
        }
        if let Err(error) = self.forward(rows, steps) {
            return fail(rows, &error.to_string());
        }
        for row in rows {
            row.done = if row.output.iter().all(|x| x.is_finite()) {
                Ok(())
            } else {
                row.state.fill(0.0);
                row.output.fill(0.0);
                Err(CodecError::Failed(format!(
                    "{}: the result is no number",
                    self.graph.file
                )))
            };
        }
    }

    fn forward(&mut self, rows: &mut [Row<'_>], steps: usize) -> Result<(), ort::Error> {
        let streams = rows.len();
        let (input, output) = (self.input.times(steps), self.output.times(steps));
        self.inputs.resize(streams * input.each(), 0.0);
        for (stream, row) in rows.iter().enumerate() {
            scatter(&input, row.input, &mut self.inputs, stream, streams);
        }
        let mut first = 0;
        for held in &mut self.states {
            let each = held.shape.each();
            held.numbers.resize(streams * each, 0.0);
            for (stream, row) in rows.iter().enumerate() {
                let state = row.state.get(first..first + each).unwrap_or_default();
                scatter(&held.shape, state, &mut held.numbers, stream, streams);
            }
            first += each;
        }
        let mut given: Vec<(Cow<'_, str>, SessionInputValue<'_>)> =
            Vec::with_capacity(self.states.len() + 2);
        let name = self.graph.input.name.as_str();
        let sizes = input.of(streams);
        given.push(match self.graph.input.dtype {
            Element::F32 => {
                let input = TensorRef::from_array_view((sizes, self.inputs.as_slice()))?;
                (name.into(), input.into())
            }
            Element::I64 => {
                self.codes.clear();
                self.codes.extend(self.inputs.iter().map(|x| *x as i64));
                let input = TensorRef::from_array_view((sizes, self.codes.as_slice()))?;
                (name.into(), input.into())
            }
        });
        for held in &self.states {
            let sizes = held.shape.of(streams);
            let state = TensorRef::from_array_view((sizes, held.numbers.as_slice()))?;
            given.push((held.input.as_str().into(), state.into()));
        }
        if let Some(name) = &self.graph.sample_rate_input {
            let rate = TensorRef::from_array_view(([0i64; 0], self.sample_rate.as_slice()))?;
            given.push((name.as_str().into(), rate.into()));
        }
        let results = self.session.run(given)?;
        let name = &self.graph.output.name;
        let value = results.get(name).ok_or_else(|| missing(name))?;
        match self.graph.output.dtype {
            Element::F32 => {
                let (_, numbers) = value.try_extract_tensor::<f32>()?;
                check_count(name, numbers.len(), streams * output.each())?;
                for (stream, row) in rows.iter_mut().enumerate() {
                    gather(&output, numbers, row.output, stream, streams);
                }
            }
            Element::I64 => {
                let (_, codes) = value.try_extract_tensor::<i64>()?;
                check_count(name, codes.len(), streams * output.each())?;
                // Codes beyond 16 bits are no codes: what takes them says so.
                let numbers: Vec<f32> = codes.iter().map(|code| *code as f32).collect();
                for (stream, row) in rows.iter_mut().enumerate() {
                    gather(&output, &numbers, row.output, stream, streams);
                }
            }
        }
        let mut first = 0;
        for held in &self.states {
            let each = held.shape.each();
            let value = results
                .get(&held.output)
                .ok_or_else(|| missing(&held.output))?;
            let (_, numbers) = value.try_extract_tensor::<f32>()?;
            check_count(&held.output, numbers.len(), streams * each)?;
            for (stream, row) in rows.iter_mut().enumerate() {
                if let Some(state) = row.state.get_mut(first..first + each) {
                    gather(&held.shape, numbers, state, stream, streams);
                }
            }
            first += each;
        }
        Ok(())
    }
}

fn missing(name: &str) -> ort::Error {
    ort::Error::new(format!("no output {name}"))
}

fn check_count(name: &str, count: usize, wanted: usize) -> Result<(), ort::Error> {
    if count == wanted {
        return Ok(());
    }
    Err(ort::Error::new(format!(
        "{name} has {count} numbers where the manifest's shape has {wanted}"
    )))
}

/// Whether the graph has an input or output of that name, type and shape. Sizes that it leaves open agree with any.
fn agrees(
    (side, outlets): (&str, &[Outlet]),
    name: &str,
    element: Element,
    shape: &Shape,
) -> Result<(), String> {
    let Some(outlet) = outlets.iter().find(|outlet| outlet.name() == name) else {
        let names: Vec<&str> = outlets.iter().map(Outlet::name).collect();
        return Err(format!(
            "the graph has no {side} {name}; it has {}",
            names.join(", ")
        ));
    };
    let ValueType::Tensor { ty, shape: has, .. } = outlet.dtype() else {
        return Err(format!("{side} {name} of the graph is no tensor"));
    };
    let wanted = match element {
        Element::F32 => TensorElementType::Float32,
        Element::I64 => TensorElementType::Int64,
    };
    let sizes_agree = has.len() == shape.sizes.len()
        && has
            .iter()
            .zip(&shape.sizes)
            .enumerate()
            .all(|(place, (has, size))| {
                if place == shape.batch {
                    *has < 0
                } else {
                    *has < 0 || *has == *size as i64
                }
            });
    if *ty == wanted && sizes_agree {
        return Ok(());
    }
    let mut sizes: Vec<String> = shape.sizes.iter().map(ToString::to_string).collect();
    if let Some(batch) = sizes.get_mut(shape.batch) {
        "batch".clone_into(batch);
    }
    Err(format!(
        "{side} {name} of the graph is {ty:?} {has:?} (-1: any size), the manifest says {element} [{}]: the batch has to be open \
         in the graph, and the rest to agree",
        sizes.join(", ")
    ))
}

fn scatter(shape: &Shape, one: &[f32], all: &mut [f32], stream: usize, streams: usize) {
    for (place, part) in shape
        .places(stream, streams)
        .zip(one.chunks_exact(shape.run()))
    {
        if let Some(target) = all.get_mut(place) {
            target.copy_from_slice(part);
        }
    }
}

fn gather(shape: &Shape, all: &[f32], one: &mut [f32], stream: usize, streams: usize) {
    for (place, part) in shape
        .places(stream, streams)
        .zip(one.chunks_exact_mut(shape.run()))
    {
        if let Some(source) = all.get(place) {
            part.copy_from_slice(source);
        }
    }
}

fn fail(rows: &mut [Row<'_>], why: &str) {
    for row in rows {
        row.state.fill(0.0);
        row.output.fill(0.0);
        row.done = Err(CodecError::Failed(why.to_owned()));
    }
}

/// One thread, because every codec thread has sessions of its own; denormal numbers as zero, because speech fades into them.
fn session(environment: &Environment, model: &[u8]) -> Result<Session, ort::Error> {
    Session::builder(environment)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_intra_threads(1)?
        .with_inter_threads(1)?
        .with_intra_op_spinning(false)?
        .with_flush_to_zero()?
        // Batches differ in size: with memory planned for one, ONNX Runtime falls back in the next and writes a log line for every tensor,
        // which is 5 % slower.
        .with_memory_pattern(false)?
        // It formats every line before our logger drops it: measured 65,000 lines in a bench of seconds.
        .with_log_level(LogLevel::Error)?
        .commit_from_memory(model)
}
