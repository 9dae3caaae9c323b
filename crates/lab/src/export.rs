//! The trials of a store as CSV and Parquet, for other programs.
//!
//! Three tables, joined by the trial's `id`: [`Part::Trials`] (a row per trial, with its key, status and measured numbers),
//! [`Part::Curves`] (a row per point of a learning curve) and [`Part::Latency`] (a row per measured length).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::{Compression, ConvertedType, LogicalType, Repetition, Type as Physical};
use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::{Type, TypePtr};

use crate::atomic;
use crate::frame::{Cells, Frame};
use crate::trial::TrialRecord;

/// Which table to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A row per trial.
    Trials,
    /// A row per point of a learning curve.
    Curves,
    /// A row per measured length.
    Latency,
}

impl Part {
    /// All tables.
    pub const ALL: [Self; 3] = [Self::Trials, Self::Curves, Self::Latency];

    /// Its file name without an ending.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trials => "trials",
            Self::Curves => "curves",
            Self::Latency => "latency",
        }
    }

    fn frame(self, records: &[TrialRecord]) -> Frame {
        match self {
            Self::Trials => Frame::trials(records),
            Self::Curves => Frame::curves(records),
            Self::Latency => Frame::latency(records),
        }
    }
}

/// Why an export was not written; the old file, if any, is untouched.
#[derive(Debug, thiserror::Error)]
#[error("export the trials to {}: {cause}", .path.display())]
pub struct ExportError {
    /// The file.
    pub path: PathBuf,
    /// The cause.
    #[source]
    pub cause: ExportCause,
}

/// The cause of an [`ExportError`].
#[derive(Debug, thiserror::Error)]
pub enum ExportCause {
    /// Input or output failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The CSV writer failed.
    #[error(transparent)]
    Csv(#[from] csv::Error),
    /// The Parquet writer failed.
    #[error(transparent)]
    Parquet(#[from] ParquetError),
}

/// Writes one table as CSV: UTF-8, comma, a header line, absent values empty.
pub fn write_csv(path: &Path, part: Part, records: &[TrialRecord]) -> Result<(), ExportError> {
    let frame = part.frame(records);
    let fill = |file: &mut std::io::BufWriter<std::fs::File>| {
        let mut writer = csv::Writer::from_writer(file);
        writer.write_record(frame.columns.iter().map(|(name, _)| *name))?;
        for row in 0..frame.height() {
            writer.write_record(frame.columns.iter().map(|(_, cells)| cells.show(row)))?;
        }
        writer.flush()?;
        Ok::<(), ExportCause>(())
    };
    atomic::write(path, fill).map_err(|cause| ExportError {
        path: path.into(),
        cause,
    })
}

/// Writes one table as Parquet: one row group, Snappy, every column optional, absent values null.
pub fn write_parquet(path: &Path, part: Part, records: &[TrialRecord]) -> Result<(), ExportError> {
    let frame = part.frame(records);
    let fill = |file: &mut std::io::BufWriter<std::fs::File>| {
        parquet_into(&frame, file).map_err(ExportCause::from)
    };
    atomic::write(path, fill).map_err(|cause| ExportError {
        path: path.into(),
        cause,
    })
}

/// Writes all tables in both forms into `folder`, which must exist; returns the six paths.
pub fn write_all(folder: &Path, records: &[TrialRecord]) -> Result<Vec<PathBuf>, ExportError> {
    let mut written = Vec::new();
    for part in Part::ALL {
        let path = folder.join(format!("{}.csv", part.name()));
        write_csv(&path, part, records)?;
        written.push(path);
        let path = folder.join(format!("{}.parquet", part.name()));
        write_parquet(&path, part, records)?;
        written.push(path);
    }
    Ok(written)
}

fn parquet_into(frame: &Frame, file: impl Write + Send) -> Result<(), ParquetError> {
    let fields = frame
        .columns
        .iter()
        .map(|(name, cells)| field(name, cells))
        .collect::<Result<Vec<_>, _>>()?;
    let schema = Type::group_type_builder("trial")
        .with_fields(fields)
        .build()?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .build();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties))?;
    let mut group = writer.next_row_group()?;
    for (_, cells) in &frame.columns {
        let Some(mut column) = group.next_column()? else {
            break;
        };
        match cells {
            Cells::Text(cells) => {
                let (values, levels) = present(cells, |text| ByteArray::from(text.as_str()));
                column
                    .typed::<ByteArrayType>()
                    .write_batch(&values, Some(&levels), None)?;
            }
            // Unsigned 64-bit numbers are stored with the same bits as signed ones, and marked unsigned.
            Cells::Count(cells) => {
                let (values, levels) = present(cells, |value| *value as i64);
                column
                    .typed::<Int64Type>()
                    .write_batch(&values, Some(&levels), None)?;
            }
            Cells::Number(cells) => {
                let (values, levels) = present(cells, |value| *value);
                column
                    .typed::<DoubleType>()
                    .write_batch(&values, Some(&levels), None)?;
            }
        }
        column.close()?;
    }
    group.close()?;
    writer.close()?;
    Ok(())
}

fn field(name: &str, cells: &Cells) -> Result<TypePtr, ParquetError> {
    let physical = match cells {
        Cells::Text(_) => Physical::BYTE_ARRAY,
        Cells::Count(_) => Physical::INT64,
        Cells::Number(_) => Physical::DOUBLE,
    };
    let builder =
        Type::primitive_type_builder(name, physical).with_repetition(Repetition::OPTIONAL);
    let builder = match cells {
        Cells::Text(_) => builder
            .with_converted_type(ConvertedType::UTF8)
            .with_logical_type(Some(LogicalType::String)),
        Cells::Count(_) => builder.with_converted_type(ConvertedType::UINT_64),
        Cells::Number(_) => builder,
    };
    Ok(Arc::new(builder.build()?))
}

/// The present values, and for every row whether it is present (definition level 1) or null (0).
fn present<T, U>(cells: &[Option<T>], convert: impl Fn(&T) -> U) -> (Vec<U>, Vec<i16>) {
    let levels = cells.iter().map(|cell| i16::from(cell.is_some())).collect();
    (cells.iter().flatten().map(convert).collect(), levels)
}
