package store

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/log"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

const (
	committedDir  = "checkpoints"
	claimedDir    = "claimed"
	quarantineDir = "quarantine"
	locksDir      = ".locks"
	stagePrefix   = ".stage-"
	trashPrefix   = ".trash-"
	reasonFile    = "reason.json"
	logsDir       = "logs"
)

// Store is a store of checkpoints. Its methods may be called concurrently, and
// by several processes on one root. Errors wrap the sentinels of package
// checkpoint or those of the file system.
type Store struct {
	fs   fsys.FS
	root string
	self Owner
	// workers is how many files are summed or synced at once.
	workers int
}

// CorruptError names a checkpoint that is damaged, so that the caller can set
// it aside with [Store.Quarantine]. Err wraps [checkpoint.ErrCorrupt].
type CorruptError struct {
	ID  checkpoint.ID
	Err error
}

func (e *CorruptError) Error() string { return fmt.Sprintf("checkpoint %s: %v", e.ID, e.Err) }
func (e *CorruptError) Unwrap() error { return e.Err }

// Open opens the store at root, an absolute path, and makes the directories
// that are missing. It fails with [checkpoint.ErrInvalid] if root is not a
// directory of this user that nobody else has any right to.
func Open(files fsys.FS, root string) (*Store, error) {
	if !filepath.IsAbs(root) {
		return nil, fmt.Errorf("store %q: path is not absolute: %w", root, checkpoint.ErrInvalid)
	}
	self, err := thisProcess()
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	s := &Store{fs: files, root: filepath.Clean(root), self: self, workers: 8}
	if err := s.mkdirAll(s.root); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	st, err := files.Lstat(s.root)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	bad := ""
	switch sys, ok := st.Sys().(*syscall.Stat_t); {
	case !st.IsDir():
		bad = "is not a directory"
	case st.Mode().Perm()&0o077 != 0:
		bad = fmt.Sprintf("has mode %04o, want 0700", st.Mode().Perm())
	case ok && int(sys.Uid) != os.Geteuid():
		bad = fmt.Sprintf("belongs to user %d", sys.Uid)
	}
	if bad != "" {
		return nil, fmt.Errorf("store: %s %s: %w", s.root, bad, checkpoint.ErrInvalid)
	}
	for _, name := range []string{committedDir, claimedDir, quarantineDir, templatesDir, locksDir} {
		if err := s.mkdir(s.path(name)); err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
	}
	// All locks are made now: on a full disk later, removing must still work.
	for _, digit := range "0123456789abcdef" {
		lock := s.path(locksDir, string(digit))
		if _, err := files.Lstat(lock); err == nil {
			continue
		}
		if err := fsys.WriteFile(files, lock, nil); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("store: %w", err)
		}
	}
	return s, nil
}

// Root is the store's directory.
func (s *Store) Root() string { return s.root }

// FreeBytes is the free space of the store's file system.
func (s *Store) FreeBytes() (int64, error) {
	n, err := s.fs.FreeBytes(s.root)
	if err != nil {
		return 0, fmt.Errorf("store: %w", err)
	}
	return n, nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(s.root, filepath.Join(elem...))
}

func (s *Store) committedPath(id checkpoint.ID) string {
	return s.path(committedDir, id.IdentityHash(), string(id))
}
func (s *Store) claimedPath(id checkpoint.ID) string {
	return s.path(claimedDir, id.IdentityHash(), string(id))
}
func (s *Store) quarantinePath(id checkpoint.ID) string { return s.path(quarantineDir, string(id)) }

// mkdirAll makes a directory and those above it, and their names durable.
func (s *Store) mkdirAll(dir string) error {
	if _, err := s.fs.Lstat(dir); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.mkdirAll(filepath.Dir(dir)); err != nil {
		return err
	}
	return s.mkdir(dir)
}

// mkdir makes a directory, unless it is there, and its name durable even so:
// who made it may have died before that.
func (s *Store) mkdir(dir string) error {
	if err := s.fs.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return s.fs.SyncDir(filepath.Dir(dir))
}

func randomName() string {
	var b [8]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}

// lock takes the lock of the ID's identity. The caller closes it.
func (s *Store) lock(ctx context.Context, id checkpoint.ID) (io.Closer, error) {
	l, err := s.fs.Lock(ctx, s.path(locksDir, string(id[:1])))
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	return l, nil
}

func (s *Store) exists(path string) (bool, error) {
	_, err := s.fs.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// move is moveInto after making the directory above the new place.
func (s *Store) move(from, to string) error {
	if dir := filepath.Dir(to); s.ofIdentity(dir) {
		if err := s.mkdir(dir); err != nil {
			return err
		}
	}
	return s.moveInto(from, to)
}

// moveInto renames a checkpoint's directory and makes that durable, or puts it
// back and returns an error. The directory above the old place is removed if
// this was the last in it. The lock is held.
func (s *Store) moveInto(from, to string) error {
	fromDir, toDir := filepath.Dir(from), filepath.Dir(to)
	if err := s.fs.Rename(from, to); err != nil {
		s.removeIfEmpty(toDir)
		return err
	}
	err := s.fs.SyncDir(toDir)
	if err == nil {
		err = s.fs.SyncDir(fromDir)
	}
	if err != nil {
		if rerr := s.fs.Rename(to, from); rerr != nil {
			return errors.Join(err, rerr)
		}
		return errors.Join(err, s.fs.SyncDir(fromDir))
	}
	s.removeIfEmpty(fromDir)
	return nil
}

// removeIfEmpty removes a directory of one identity. That it fails, because it
// is not empty or otherwise, harms nothing; nor does its return after a crash.
func (s *Store) removeIfEmpty(dir string) {
	if s.ofIdentity(dir) {
		_ = s.fs.Remove(dir)
	}
}

// ofIdentity reports whether the directory is that of one identity.
func (s *Store) ofIdentity(dir string) bool {
	parent := filepath.Dir(dir)
	return parent == s.path(committedDir) || parent == s.path(claimedDir)
}

// readManifest reads the manifest in dir and checks that it is id's. A missing
// or bad one is a CorruptError if dir exists, ErrNotFound otherwise.
func (s *Store) readManifest(dir string, id checkpoint.ID) (*checkpoint.Manifest, error) {
	m, err := s.decodeManifest(dir)
	if err == nil && m.ID != id {
		err = fmt.Errorf("manifest is that of %s: %w", m.ID, checkpoint.ErrCorrupt)
	}
	if err == nil {
		return m, nil
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		there, lerr := s.exists(dir)
		if lerr != nil {
			return nil, lerr
		}
		if !there {
			return nil, fmt.Errorf("checkpoint %s: %w", id, checkpoint.ErrNotFound)
		}
		err = fmt.Errorf("manifest is missing: %w: %w", checkpoint.ErrCorrupt, err)
	case errors.Is(err, fsys.ErrNotRegular), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EIO):
		err = fmt.Errorf("manifest: %w: %w", checkpoint.ErrCorrupt, err)
	case !errors.Is(err, checkpoint.ErrCorrupt):
		return nil, fmt.Errorf("checkpoint %s: %w", id, err)
	}
	return nil, &CorruptError{id, err}
}

func (s *Store) decodeManifest(dir string) (*checkpoint.Manifest, error) {
	f, err := s.fs.Open(filepath.Join(dir, checkpoint.ManifestFile))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return checkpoint.ReadManifest(f)
}

func checkID(id checkpoint.ID) error {
	_, err := checkpoint.ParseID(string(id))
	return err
}

// Latest is the manifest of the identity's newest committed checkpoint. It
// first takes back what dead processes had claimed of this identity. It fails
// with [checkpoint.ErrNotFound] if there is none, with [checkpoint.ErrBusy] if a
// living process has claimed all there are, and with a [CorruptError] that names the newest one if that one's manifest cannot be read. It looks at
// manifests only: [Claim.Verify] looks at the rest.
func (s *Store) Latest(ctx context.Context, identity checkpoint.Identity) (*checkpoint.Manifest, error) {
	if err := identity.Validate(); err != nil {
		return nil, err
	}
	hash := identity.Hash()
	if _, err := s.releaseStale(ctx, hash); err != nil {
		return nil, fmt.Errorf("latest checkpoint of %s: %w", identity, err)
	}
	for range 10 { // others may claim what we are looking at
		ids, err := s.ids(s.path(committedDir, hash))
		if err != nil {
			return nil, fmt.Errorf("latest checkpoint of %s: %w", identity, err)
		}
		if len(ids) == 0 {
			// A claim that is left is of a living process.
			claimed, err := s.ids(s.path(claimedDir, hash))
			if err != nil {
				return nil, fmt.Errorf("latest checkpoint of %s: %w", identity, err)
			}
			if len(claimed) > 0 {
				return nil, fmt.Errorf("checkpoint %s is being restored by another container: %w", claimed[0], checkpoint.ErrBusy)
			}
			return nil, fmt.Errorf("identity %s: %w", identity, checkpoint.ErrNotFound)
		}
		m, err := s.newest(ids)
		if err == nil && m.Identity != identity {
			return nil, fmt.Errorf("identity %s: hash is that of %s: %w", identity, m.Identity, checkpoint.ErrNotFound)
		}
		if !errors.Is(err, checkpoint.ErrNotFound) {
			return m, err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return nil, fmt.Errorf("latest checkpoint of %s: %w", identity, checkpoint.ErrBusy)
}

// newest reads the manifest of the newest of the ids, which are sorted. Only
// those of one second need a look at the time in the manifest.
func (s *Store) newest(ids []checkpoint.ID) (*checkpoint.Manifest, error) {
	var newest *checkpoint.Manifest
	last := ids[len(ids)-1]
	for _, id := range slices.Backward(ids) {
		if second(id) != second(last) {
			break
		}
		m, err := s.readManifest(s.committedPath(id), id)
		if err != nil {
			return nil, err
		}
		if newest == nil || m.CreatedAt.After(newest.CreatedAt) {
			newest = m
		}
	}
	return newest, nil
}

// second is the part of an ID up to its time, to the second.
func second(id checkpoint.ID) string { return string(id[:32]) }

// ids lists the checkpoints in the directory of an identity, sorted. A directory
// that is missing is empty; names that are no ID of it are left out.
func (s *Store) ids(dir string) ([]checkpoint.ID, error) {
	entries, err := s.fs.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var ids []checkpoint.ID
	for _, e := range entries {
		if id, err := checkpoint.ParseID(e.Name()); err == nil && e.IsDir() && id.IdentityHash() == filepath.Base(dir) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// releaseStale takes back what dead processes had claimed of the identity.
func (s *Store) releaseStale(ctx context.Context, hash string) ([]checkpoint.ID, error) {
	ids, err := s.ids(s.path(claimedDir, hash))
	if err != nil {
		return nil, err
	}
	var released []checkpoint.ID
	var errs []error
	for _, id := range ids {
		_, alive, err := s.owner(s.claimedPath(id) + ownerSuffix)
		if err == nil && !alive {
			var l io.Closer
			if l, err = s.lock(ctx, id); err == nil {
				var ok bool
				ok, err = s.releaseIfStale(ctx, id)
				l.Close()
				if ok {
					released = append(released, id)
				}
			}
		}
		if err != nil && !errors.Is(err, checkpoint.ErrBusy) { // busy: someone was faster
			errs = append(errs, fmt.Errorf("checkpoint %s: stale claim: %w", id, err))
		}
	}
	return released, errors.Join(errs...)
}

// releaseIfStale takes the checkpoint back if it is claimed by a dead process.
// If it is claimed by a live one, the error is ErrBusy. The lock is held.
func (s *Store) releaseIfStale(ctx context.Context, id checkpoint.ID) (bool, error) {
	claimed := s.claimedPath(id)
	if there, err := s.exists(claimed); err != nil || !there {
		return false, err
	}
	o, alive, err := s.owner(claimed + ownerSuffix)
	if err != nil {
		return false, err
	}
	if alive {
		if o == nil {
			return false, fmt.Errorf("claimed, by whom cannot be read: %w", checkpoint.ErrBusy)
		}
		return false, fmt.Errorf("claimed by process %d for container %q: %w", o.PID, o.ContainerID, checkpoint.ErrBusy)
	}
	if err := s.release(id); err != nil {
		return false, err
	}
	log.G(ctx).WithFields(log.Fields{"checkpoint_id": id, "op": "release", "reason": "its owner is gone"}).Info("took back a claimed checkpoint")
	return true, nil
}

// release puts a claimed checkpoint back. The lock is held.
func (s *Store) release(id checkpoint.ID) error {
	if err := s.move(s.claimedPath(id), s.committedPath(id)); err != nil {
		return err
	}
	s.dropOwner(id)
	return nil
}

// dropOwner removes the owner's file of a checkpoint that is claimed no more.
// If that fails the file stays and means nothing; the next claim replaces it.
func (s *Store) dropOwner(id checkpoint.ID) {
	_ = s.fs.Remove(s.claimedPath(id) + ownerSuffix)
	s.removeIfEmpty(s.path(claimedDir, id.IdentityHash()))
}

// locate finds where the checkpoint is.
func (s *Store) locate(id checkpoint.ID) (State, string, error) {
	if err := checkID(id); err != nil {
		return "", "", err
	}
	for range 3 { // it may move from a place not yet seen to one already seen
		for _, place := range []struct {
			state State
			dir   string
		}{{Committed, s.committedPath(id)}, {Claimed, s.claimedPath(id)}, {Quarantined, s.quarantinePath(id)}} {
			there, err := s.exists(place.dir)
			if err != nil {
				return "", "", fmt.Errorf("checkpoint %s: %w", id, err)
			}
			if there {
				return place.state, place.dir, nil
			}
		}
	}
	return "", "", fmt.Errorf("checkpoint %s: %w", id, checkpoint.ErrNotFound)
}

// Manifest reads the manifest of a committed, claimed or quarantined
// checkpoint. Errors: [checkpoint.ErrNotFound], a [CorruptError].
func (s *Store) Manifest(ctx context.Context, id checkpoint.ID) (*checkpoint.Manifest, error) {
	_, dir, err := s.locate(id)
	if err != nil {
		return nil, err
	}
	return s.readManifest(dir, id)
}

// State is where a checkpoint is in its life.
type State string

// The states of a checkpoint. Corrupt is a committed one whose manifest is
// missing or damaged.
const (
	Committed   State = "committed"
	Claimed     State = "claimed"
	Quarantined State = "quarantined"
	Corrupt     State = "corrupt"
)

// Record is one checkpoint in a list.
type Record struct {
	// ID is empty for a stranger: something in the store that has no ID's name.
	ID    checkpoint.ID
	State State
	Path  string
	// Manifest is nil where Err says why.
	Manifest *checkpoint.Manifest
	Owner    *Owner // of a claimed one, where its file can be read
	Reason   string // of a quarantined one
	Err      error
}

// Time is when the checkpoint was made.
func (r *Record) Time() time.Time {
	if r.Manifest != nil {
		return r.Manifest.CreatedAt
	}
	if r.ID != "" {
		if t, err := time.Parse("20060102T150405", string(r.ID[17:32])); err == nil {
			return t
		}
	}
	return time.Time{}
}

func (r *Record) identity() string {
	if r.Manifest != nil {
		return r.Manifest.Identity.String()
	}
	return ""
}

// List reads all manifests. It is sorted by identity, then time; those without
// a manifest come first. What appears or goes while it reads may be missing.
func (s *Store) List(ctx context.Context) ([]Record, error) {
	var records []Record
	for _, top := range []struct {
		state State
		dir   string
	}{{Committed, committedDir}, {Claimed, claimedDir}} {
		hashes, err := s.fs.ReadDir(s.path(top.dir))
		if err != nil {
			return nil, fmt.Errorf("list checkpoints: %w", err)
		}
		for _, h := range hashes {
			r, err := s.listDir(ctx, top.state, s.path(top.dir, h.Name()), h.Name())
			if err != nil {
				return nil, fmt.Errorf("list checkpoints: %w", err)
			}
			records = append(records, r...)
		}
	}
	r, err := s.listDir(ctx, Quarantined, s.path(quarantineDir), "")
	if err != nil {
		return nil, fmt.Errorf("list checkpoints: %w", err)
	}
	records = append(records, r...)
	// A checkpoint that moved meanwhile was seen twice.
	seen := map[checkpoint.ID]bool{}
	records = slices.DeleteFunc(records, func(r Record) bool {
		again := r.ID != "" && seen[r.ID]
		seen[r.ID] = true
		return again
	})
	slices.SortStableFunc(records, func(a, b Record) int {
		return cmp.Or(cmp.Compare(a.identity(), b.identity()), a.Time().Compare(b.Time()), cmp.Compare(a.ID, b.ID))
	})
	return records, nil
}

func (s *Store) listDir(ctx context.Context, state State, dir, hash string) ([]Record, error) {
	entries, err := s.fs.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
		return []Record{{State: Corrupt, Path: dir, Err: fmt.Errorf("stranger in the store: %w: %w", checkpoint.ErrCorrupt, err)}}, nil
	}
	if err != nil {
		return nil, err
	}
	var records []Record
	for _, e := range entries {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		r := Record{State: state, Path: filepath.Join(dir, e.Name())}
		if state == Claimed && strings.HasSuffix(e.Name(), ownerSuffix) {
			continue
		}
		id, err := checkpoint.ParseID(e.Name())
		if err != nil || !e.IsDir() || hash != "" && hash != id.IdentityHash() {
			r.State, r.Err = Corrupt, fmt.Errorf("stranger in the store: %w", checkpoint.ErrCorrupt)
			records = append(records, r)
			continue
		}
		r.ID = id
		r.Manifest, r.Err = s.readManifest(r.Path, id)
		switch {
		case errors.Is(r.Err, checkpoint.ErrNotFound):
			continue
		case errors.Is(r.Err, checkpoint.ErrCorrupt) && state == Committed:
			r.State = Corrupt
		}
		switch state {
		case Claimed:
			if r.Owner, _, err = s.owner(r.Path + ownerSuffix); err != nil {
				r.Err = errors.Join(r.Err, err)
			}
		case Quarantined:
			r.Reason = s.reason(r.Path)
		}
		records = append(records, r)
	}
	return records, nil
}

// quarantineReason is the form of reason.json.
type quarantineReason struct {
	Reason string    `json:"reason"`
	Time   time.Time `json:"time"`
}

const maxReasonBytes = 64 << 10

// reason is empty where it was not written or is damaged.
func (s *Store) reason(dir string) string {
	var r quarantineReason
	if data, err := fsys.ReadFile(s.fs, filepath.Join(dir, reasonFile), maxReasonBytes); err == nil {
		_ = json.Unmarshal(data, &r)
	}
	return r.Reason
}

// Quarantine sets a committed checkpoint aside for study, so that it is never
// restored again. It adds the reason and, below logs/, the given files, of each
// at most the last [MaxLogBytes]. The checkpoint has moved even if it fails to
// write these; calling it again then tries once more. Errors:
// [checkpoint.ErrNotFound], [checkpoint.ErrBusy] if claimed.
func (s *Store) Quarantine(ctx context.Context, id checkpoint.ID, reason string, logs map[string][]byte) error {
	if err := checkID(id); err != nil {
		return err
	}
	l, err := s.lock(ctx, id)
	if err != nil {
		return fmt.Errorf("quarantine checkpoint %s: %w", id, err)
	}
	defer l.Close()
	if _, err = s.releaseIfStale(ctx, id); err == nil {
		err = s.quarantine(s.committedPath(id), id, reason, logs)
	}
	if err != nil {
		return fmt.Errorf("quarantine checkpoint %s: %w", id, err)
	}
	return nil
}

// MaxLogBytes bounds each log that Quarantine keeps.
const MaxLogBytes = 1 << 20

func (s *Store) quarantine(from string, id checkpoint.ID, reason string, logs map[string][]byte) error {
	to := s.quarantinePath(id)
	err := s.move(from, to)
	if errors.Is(err, fs.ErrNotExist) {
		there, lerr := s.exists(to)
		switch {
		case lerr != nil:
			return lerr
		case !there:
			return checkpoint.ErrNotFound
		}
	} else if err != nil {
		return err
	}
	if len(reason) > maxReasonBytes/8 { // JSON may make six bytes of one
		reason = reason[:maxReasonBytes/8] + "..."
	}
	data, err := json.Marshal(quarantineReason{reason, time.Now().UTC()})
	if err != nil {
		return err
	}
	if err := s.replaceFile(filepath.Join(to, reasonFile), data); err != nil {
		return err
	}
	if len(logs) > 0 {
		if err := s.mkdir(filepath.Join(to, logsDir)); err != nil {
			return err
		}
		for name, data := range logs {
			if name != filepath.Base(name) || name == "." || name == ".." || name == "/" {
				return fmt.Errorf("log %q: not a file name: %w", name, checkpoint.ErrInvalid)
			}
			if err := s.replaceFile(filepath.Join(to, logsDir, name), data[max(0, len(data)-MaxLogBytes):]); err != nil {
				return err
			}
		}
		if err := s.fs.SyncDir(filepath.Join(to, logsDir)); err != nil {
			return err
		}
	}
	return s.fs.SyncDir(to)
}

func (s *Store) replaceFile(path string, data []byte) error {
	if err := s.fs.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return fsys.WriteFile(s.fs, path, data)
}

// Remove removes a committed or quarantined checkpoint, for good once it
// returns. Errors: [checkpoint.ErrNotFound], [checkpoint.ErrBusy] if claimed.
func (s *Store) Remove(ctx context.Context, id checkpoint.ID) error {
	if err := checkID(id); err != nil {
		return err
	}
	trash, err := s.removeLocked(ctx, id)
	if err != nil {
		return fmt.Errorf("remove checkpoint %s: %w", id, err)
	}
	s.removeTrash(ctx, trash)
	return nil
}

func (s *Store) removeLocked(ctx context.Context, id checkpoint.ID) (trash string, err error) {
	l, err := s.lock(ctx, id)
	if err != nil {
		return "", err
	}
	defer l.Close()
	if _, err := s.releaseIfStale(ctx, id); err != nil {
		return "", err
	}
	for _, from := range []string{s.committedPath(id), s.quarantinePath(id)} {
		if trash, err = s.trash(from); !errors.Is(err, fs.ErrNotExist) {
			return trash, err
		}
	}
	return "", checkpoint.ErrNotFound
}

// trash renames a directory so that it counts no more, durably.
func (s *Store) trash(from string) (string, error) {
	if _, err := s.fs.Lstat(from); err != nil {
		return "", err
	}
	to := s.path(trashPrefix + randomName())
	return to, s.move(from, to)
}

// removeTrash frees the space. What it fails to remove, Sweep and GC remove.
func (s *Store) removeTrash(ctx context.Context, trash string) {
	if err := s.fs.RemoveAll(trash); err != nil {
		log.G(ctx).WithError(err).WithField("op", "remove").Warn("removed checkpoint still takes up space")
	}
}
