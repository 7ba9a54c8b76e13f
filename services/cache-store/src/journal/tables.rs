//! The journal's tables, and what is done to them within one transaction.

use super::rows::{self, Due, Held, Kind, Pair};
use crate::disk::volume;
use cacheclip_chunk::{ChunkKey, DocumentId, LayoutId};
use redb::{
    Database, ReadTransaction, ReadableDatabase as _, ReadableTable, Table, TableDefinition, WriteTransaction,
};
use std::collections::HashSet;
use std::path::Path;

pub(super) type Done<T> = Result<T, redb::Error>;

pub(super) const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers v1");
/// By document and key.
pub(super) const CLAIMS: TableDefinition<'_, &Pair, &Held> = TableDefinition::new("claims v1");
/// By key and document: when the claim ends.
pub(super) const HOLDERS: TableDefinition<'_, &Pair, u64> = TableDefinition::new("holders v1");
/// Generation and time of a key's last deletion.
pub(super) const TOMBSTONES: TableDefinition<'_, &[u8; 32], (u64, u64)> =
    TableDefinition::new("tombstones v1");
/// Receipts by document.
pub(super) const DELETIONS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("deletions v1");
pub(super) const DOOMED: TableDefinition<'_, &[u8; 32], ()> = TableDefinition::new("doomed v1");
/// When a key's pin ends.
pub(super) const PINS: TableDefinition<'_, &[u8; 32], u64> = TableDefinition::new("pins v1");
/// What the sweeper will remove, by time.
pub(super) const DUES: TableDefinition<'_, &Due, ()> = TableDefinition::new("dues v1");

pub(super) const GENERATION: &str = "generation";
/// The largest generation of which tombstones were forgotten: who began before it is refused altogether.
pub(super) const FLOOR: &str = "floor";

/// Opens a database with all its tables.
pub(super) fn begin(path: &Path) -> Done<Database> {
    let database = volume::database(path)?;
    let transaction = database.begin_write()?;
    {
        transaction.open_table(CLAIMS)?;
        transaction.open_table(HOLDERS)?;
        transaction.open_table(TOMBSTONES)?;
        transaction.open_table(DELETIONS)?;
        transaction.open_table(DOOMED)?;
        transaction.open_table(PINS)?;
        transaction.open_table(DUES)?;
        let mut numbers = transaction.open_table(NUMBERS)?;
        if numbers.get(GENERATION)?.is_none() {
            numbers.insert(GENERATION, 1)?;
        }
    }
    transaction.commit()?;
    Ok(database)
}

pub(super) fn current(database: &Database) -> Done<u64> {
    let numbers = database.begin_read()?.open_table(NUMBERS)?;
    Ok(numbers.get(GENERATION)?.map_or(1, |it| it.value()))
}

/// The largest generation of which tombstones were forgotten.
pub(super) fn floor(transaction: &ReadTransaction) -> Done<u64> {
    Ok(transaction.open_table(NUMBERS)?.get(FLOOR)?.map_or(0, |it| it.value()))
}

/// Which of these keys were deleted after a generation.
pub(super) fn deleted_since(
    transaction: &ReadTransaction,
    keys: &[ChunkKey],
    begun: u64,
) -> Done<HashSet<ChunkKey>> {
    if floor(transaction)? > begun {
        return Ok(keys.iter().copied().collect());
    }
    let tombstones = transaction.open_table(TOMBSTONES)?;
    let mut deleted = HashSet::new();
    for key in keys {
        if tombstones.get(key.as_bytes())?.is_some_and(|row| row.value().0 > begun) {
            deleted.insert(*key);
        }
    }
    Ok(deleted)
}

pub(super) fn advance(transaction: &WriteTransaction) -> Done<u64> {
    let mut numbers = transaction.open_table(NUMBERS)?;
    let next = numbers.get(GENERATION)?.map_or(1, |it| it.value()) + 1;
    numbers.insert(GENERATION, next)?;
    Ok(next)
}

/// The generation of a document's last deletion; 0: there was none.
pub(super) fn deleted(
    deletions: &impl ReadableTable<&'static [u8; 32], &'static [u8]>,
    document: DocumentId,
) -> Done<u64> {
    Ok(deletions.get(document.as_bytes())?.map_or(0, |row| rows::number(row.value(), 0)))
}

/// Rows of the documents that claim a key, with the ends of their claims.
pub(super) fn claims_of(
    holders: &impl ReadableTable<&'static Pair, u64>,
    key: &ChunkKey,
) -> Done<Vec<(Pair, u64)>> {
    let (least, greatest) = rows::beginning(key.as_bytes());
    let mut found = Vec::new();
    for row in holders.range::<&Pair>(&least..=&greatest)? {
        let (row, until) = row?;
        found.push((*row.value(), until.value()));
    }
    Ok(found)
}

/// Removes a document's claims; which they were.
pub(super) fn release(
    transaction: &WriteTransaction,
    document: DocumentId,
) -> Done<Vec<(ChunkKey, LayoutId)>> {
    let mut claims = transaction.open_table(CLAIMS)?;
    let mut holders = transaction.open_table(HOLDERS)?;
    let mut dues = transaction.open_table(DUES)?;
    let (least, greatest) = rows::beginning(document.as_bytes());
    let mut found = Vec::new();
    for row in claims.range::<&Pair>(&least..=&greatest)? {
        let (row, held) = row?;
        found.push((*row.value(), rows::unpack_held(held.value())));
    }
    for (row, (_, until)) in &found {
        claims.remove(row)?;
        holders.remove(&rows::swapped(row))?;
        dues.remove(&rows::due(Kind::Claim, *until, row))?;
    }
    Ok(found.into_iter().map(|(row, held)| (ChunkKey::from_bytes(rows::part(&row, 32)), held.0)).collect())
}

pub(super) fn doom(transaction: &WriteTransaction, keys: &[ChunkKey], generation: u64, now: u64) -> Done<()> {
    let mut tombstones = transaction.open_table(TOMBSTONES)?;
    let mut doomed = transaction.open_table(DOOMED)?;
    let mut pins = transaction.open_table(PINS)?;
    let mut dues = transaction.open_table(DUES)?;
    for key in keys {
        let before = tombstones.insert(key.as_bytes(), (generation, now))?.map(|it| it.value().1);
        if let Some(at) = before {
            dues.remove(&rows::due(Kind::Tombstone, at, key.as_bytes()))?;
        }
        dues.insert(&rows::due(Kind::Tombstone, now, key.as_bytes()), ())?;
        doomed.insert(key.as_bytes(), ())?;
        unpin(&mut pins, &mut dues, key)?;
    }
    Ok(())
}

/// Removes a key's pin; when it would have ended, or 0.
pub(super) fn unpin(
    pins: &mut Table<'_, &'static [u8; 32], u64>,
    dues: &mut Table<'_, &'static Due, ()>,
    key: &ChunkKey,
) -> Done<u64> {
    let Some(until) = pins.remove(key.as_bytes())?.map(|it| it.value()) else { return Ok(0) };
    dues.remove(&rows::due(Kind::Pin, until, key.as_bytes()))?;
    Ok(until)
}

/// Removes what is due. Rows of what is due are exact: what was renewed has another.
pub(super) fn forget(transaction: &WriteTransaction, due: &[(Kind, Due)]) -> Done<()> {
    let mut dues = transaction.open_table(DUES)?;
    let mut claims = transaction.open_table(CLAIMS)?;
    let mut holders = transaction.open_table(HOLDERS)?;
    let mut pins = transaction.open_table(PINS)?;
    let mut tombstones = transaction.open_table(TOMBSTONES)?;
    let mut deletions = transaction.open_table(DELETIONS)?;
    let mut numbers = transaction.open_table(NUMBERS)?;
    let mut floor = numbers.get(FLOOR)?.map_or(0, |it| it.value());
    for (kind, row) in due {
        dues.remove(row)?;
        let id = rows::part(row, 9);
        match kind {
            Kind::Claim => {
                let pair = rows::pair(&id, &rows::part(row, 41));
                claims.remove(&pair)?;
                holders.remove(&rows::swapped(&pair))?;
            }
            Kind::Pin => drop(pins.remove(&id)?),
            Kind::Tombstone => {
                floor = tombstones.remove(&id)?.map_or(floor, |it| floor.max(it.value().0));
            }
            Kind::Deletion => {
                let generation = deletions.remove(&id)?.map_or(0, |it| rows::number(it.value(), 0));
                floor = floor.max(generation);
            }
        }
    }
    numbers.insert(FLOOR, floor)?;
    Ok(())
}
