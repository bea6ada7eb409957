package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

// Stage is a checkpoint that is being written. Its methods must not be called
// concurrently.
type Stage struct {
	s         *Store
	id        checkpoint.ID
	dir       string
	committed bool
}

// Stage makes a new directory, invisible to readers, to write a checkpoint
// into. The caller ends it with Commit or Abort.
func (s *Store) Stage(ctx context.Context, id checkpoint.ID) (*Stage, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	g := &Stage{s: s, id: id, dir: s.path(stagePrefix + string(id) + "-" + randomName())}
	err := s.writeOwner(g.dir+ownerSuffix, "")
	if err == nil {
		err = s.fs.Mkdir(g.dir, 0o700)
	}
	if err == nil {
		err = s.fs.Mkdir(filepath.Join(g.dir, checkpoint.ImageDir), 0o700)
	}
	if err != nil {
		return nil, fmt.Errorf("stage checkpoint %s: %w", id, errors.Join(err, g.Abort()))
	}
	return g, nil
}

// Dir is the absolute path of the directory to write into.
func (g *Stage) Dir() string { return g.dir }

// Abort removes the stage. It does nothing after Commit succeeded, or if the
// stage is gone.
func (g *Stage) Abort() error {
	if g.committed {
		return nil
	}
	err := g.s.fs.RemoveAll(g.dir)
	if err == nil {
		err = g.dropOwner()
	}
	if err != nil {
		return fmt.Errorf("abort checkpoint %s: %w", g.id, err)
	}
	return nil
}

func (g *Stage) dropOwner() error {
	if err := g.s.fs.Remove(g.dir + ownerSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Commit makes the stage durable and then visible, in one step: as a version of
// the template that m.Template names, or else as a checkpoint of m.Identity. It fills in
// m.Files, m.Sizes.TotalBytes, m.Timings.FsyncMicros (until all files were
// synced, while they were summed too) and m.Timings.CommitMicros (the rest; on
// disk without the final rename, which it cannot know yet).
//
// It fails with [checkpoint.ErrInvalid] if the stage holds anything but regular
// files and directories. After an error nothing is visible, and both Commit and
// Abort may be called again; only if the disk fails both to commit and to go
// back, which the error then tells, may the checkpoint be visible. Once ctx is
// done Commit stops waiting for the disk, except for the final rename.
func (g *Stage) Commit(ctx context.Context, m *checkpoint.Manifest) error {
	start := time.Now()
	if g.committed {
		return fmt.Errorf("commit checkpoint %s: already committed: %w", g.id, checkpoint.ErrInvalid)
	}
	if m.ID != g.id {
		return fmt.Errorf("commit checkpoint %s: manifest is that of %q: %w", g.id, m.ID, checkpoint.ErrInvalid)
	}
	// A copy, for seal may still be at work when we no longer wait for it.
	sealed, err := await(ctx, func() (*checkpoint.Manifest, error) { return g.seal(ctx, *m, start) })
	if err == nil {
		err = g.publish(ctx, g.s.place(m))
	}
	if err != nil {
		return fmt.Errorf("commit checkpoint %s: %w", g.id, err)
	}
	g.committed = true
	*m = *sealed
	m.Timings.CommitMicros = time.Since(start).Microseconds() - m.Timings.FsyncMicros
	_ = g.dropOwner() // alone it means nothing, and Sweep removes it
	return nil
}

// seal makes all that is in the stage durable, the manifest last.
func (g *Stage) seal(ctx context.Context, m checkpoint.Manifest, start time.Time) (*checkpoint.Manifest, error) {
	manifest := filepath.Join(g.dir, checkpoint.ManifestFile)
	if err := g.s.fs.Remove(manifest); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err // of an earlier Commit that failed
	}
	t, err := g.s.walk(ctx, g.dir)
	if err != nil {
		return nil, err
	}
	var sizes []checkpoint.File
	for _, name := range t.files {
		p := filepath.Join(g.dir, name)
		if err := g.s.fs.Chmod(p, 0o600); err != nil {
			return nil, err
		}
		st, err := g.s.fs.Lstat(p)
		if err != nil {
			return nil, err
		}
		sizes = append(sizes, checkpoint.File{Path: name, SizeBytes: st.Size()})
	}
	for _, name := range t.dirs {
		if err := g.s.fs.Chmod(filepath.Join(g.dir, name), 0o700); err != nil {
			return nil, err
		}
	}
	// The largest first: one file is most of a checkpoint, and syncing it waits
	// for the disk while summing it takes the processor.
	slices.SortStableFunc(sizes, func(a, b checkpoint.File) int { return cmp.Compare(b.SizeBytes, a.SizeBytes) })
	sums := make([]checkpoint.File, len(sizes))
	var tasks []func(context.Context) error
	for i, f := range sizes {
		p := filepath.Join(g.dir, f.Path)
		tasks = append(tasks,
			func(context.Context) error { return syncFile(g.s.fs, p) },
			func(ctx context.Context) (err error) {
				sums[i], err = sum(ctx, g.s.fs, p, checkpoint.BlockBytes(f.Path, f.SizeBytes))
				sums[i].Path = f.Path
				return err
			})
	}
	if err := parallel(ctx, g.s.workers, tasks); err != nil {
		return nil, err
	}
	m.FormatVersion = checkpoint.FormatVersion
	m.Timings.FsyncMicros = time.Since(start).Microseconds()
	m.Files, m.Sizes.TotalBytes = sums, 0
	slices.SortFunc(m.Files, func(a, b checkpoint.File) int { return cmp.Compare(a.Path, b.Path) })
	for _, f := range m.Files {
		m.Sizes.TotalBytes += f.SizeBytes
	}
	m.Timings.CommitMicros = time.Since(start).Microseconds() - m.Timings.FsyncMicros
	if err := m.Validate(); err != nil {
		return nil, err
	}
	data, err := m.Encode()
	if err != nil {
		return nil, err
	}
	if len(data) > checkpoint.MaxManifestBytes {
		return nil, fmt.Errorf("manifest of %d bytes, at most %d are allowed: %w", len(data), checkpoint.MaxManifestBytes, checkpoint.ErrInvalid)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := fsys.WriteFile(g.s.fs, manifest, data); err != nil {
		return nil, err
	}
	for _, name := range slices.Backward(t.dirs) { // a parent comes before its children
		if err := g.s.fs.SyncDir(filepath.Join(g.dir, name)); err != nil {
			return nil, err
		}
	}
	return &m, nil
}

// publish gives the sealed stage its final name.
func (g *Stage) publish(ctx context.Context, place string) error {
	l, err := g.s.lock(ctx, g.id)
	if err != nil {
		return err
	}
	defer l.Close()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err = g.s.mkdirPlace(place); err == nil {
		err = g.s.move(g.dir, place)
	}
	if err == nil {
		return nil
	}
	// move goes back after an error. If it could not, the stage has lost its
	// manifest at least, and is never restored: its container runs on.
	if there, lerr := g.s.exists(g.dir); lerr == nil && !there {
		err = errors.Join(err, fmt.Errorf("could not go back: %w", checkpoint.ErrCorrupt),
			g.s.fs.Remove(filepath.Join(place, checkpoint.ManifestFile)))
	}
	return err
}

// tree is what a directory holds, as slash-separated paths relative to it.
type tree struct {
	files []string
	dirs  []string // "." first, each before what is in it
}

const maxDepth = 16

// walk lists a checkpoint's directory. It refuses with ErrInvalid what is
// neither a regular file nor a directory, and names that JSON cannot hold.
func (s *Store) walk(ctx context.Context, root string) (*tree, error) {
	t := &tree{dirs: []string{"."}}
	for i := 0; i < len(t.dirs); i++ {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		dir := t.dirs[i]
		entries, err := s.fs.ReadDir(filepath.Join(root, dir))
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			name := path.Join(dir, e.Name())
			switch {
			case !utf8.ValidString(e.Name()):
				return nil, fmt.Errorf("%q: name is not UTF-8: %w", name, checkpoint.ErrInvalid)
			case e.Type().IsRegular():
				t.files = append(t.files, name)
			case !e.IsDir():
				return nil, fmt.Errorf("%q: %w: %w", name, fsys.ErrNotRegular, checkpoint.ErrInvalid)
			case depth(name) > maxDepth:
				return nil, fmt.Errorf("%q: more than %d directories deep: %w", name, maxDepth, checkpoint.ErrInvalid)
			default:
				t.dirs = append(t.dirs, name)
			}
		}
	}
	return t, nil
}

func depth(name string) int {
	n := 0
	for ; name != "."; name = path.Dir(name) {
		n++
	}
	return n
}

func syncFile(fsys fsys.FS, p string) error {
	f, err := fsys.Open(p)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	buffers    = sync.Pool{New: func() any { return new([256 << 10]byte) }}
)

// sum reads a regular file and returns its size and checksums, those of its
// blocks too unless blockBytes is 0.
func sum(ctx context.Context, files fsys.FS, p string, blockBytes int64) (checkpoint.File, error) {
	f, err := files.Open(p)
	if err != nil {
		return checkpoint.File{}, err
	}
	defer f.Close()
	buf := buffers.Get().(*[256 << 10]byte)
	defer buffers.Put(buf)
	var s checkpoint.File
	if blockBytes > 0 {
		s.Blocks = &checkpoint.Blocks{SizeBytes: blockBytes}
	}
	var crc uint32
	for {
		if ctx.Err() != nil {
			return checkpoint.File{}, context.Cause(ctx)
		}
		b := buf[:]
		if blockBytes > 0 { // no read goes beyond the end of a block
			b = buf[:min(int64(len(buf)), blockBytes-s.SizeBytes%blockBytes)]
		}
		n, err := f.Read(b)
		crc = crc32.Update(crc, castagnoli, b[:n])
		s.SizeBytes += int64(n)
		end := err == io.EOF
		if s.Blocks != nil && (n > 0 && s.SizeBytes%blockBytes == 0 || end && s.SizeBytes%blockBytes > 0) {
			s.Blocks.Add(crc)
		}
		if end {
			s.CRC32C = fmt.Sprintf("%08x", crc)
			return s, nil
		}
		if err != nil {
			return checkpoint.File{}, err
		}
	}
}

// size is that of a regular file.
func size(files fsys.FS, p string) (int64, error) {
	st, err := files.Lstat(p)
	if err == nil && !st.Mode().IsRegular() {
		err = fsys.ErrNotRegular
	}
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// Verify reads all of a checkpoint: every file that the manifest lists is there,
// regular, of its size and checksum, and there is no other. What quarantine
// added does not count. Damage is a [CorruptError] that names the file.
func (s *Store) Verify(ctx context.Context, id checkpoint.ID) error {
	state, dir, err := s.locate(id)
	if err != nil {
		return err
	}
	return s.verify(ctx, dir, id, state == Quarantined, nil)
}

// Deferred tells of which files a verification is to compare no more than the
// size: whoever reads them checks each block. nil stands for none.
type Deferred func(checkpoint.File) bool

func (s *Store) verify(ctx context.Context, dir string, id checkpoint.ID, quarantined bool, deferred Deferred) error {
	m, err := s.readManifest(dir, id)
	if err != nil {
		return err
	}
	t, err := s.walk(ctx, dir)
	if errors.Is(err, checkpoint.ErrInvalid) {
		return &CorruptError{id, fmt.Errorf("%w: %w", checkpoint.ErrCorrupt, err)}
	}
	if err != nil {
		return fmt.Errorf("verify checkpoint %s: %w", id, err)
	}
	there := map[string]bool{}
	for _, name := range t.files {
		there[name] = true
	}
	delete(there, checkpoint.ManifestFile)
	var tasks []func(context.Context) error
	for _, f := range m.Files {
		if !there[f.Path] {
			return &CorruptError{id, fmt.Errorf("file %q is missing: %w", f.Path, checkpoint.ErrCorrupt)}
		}
		delete(there, f.Path)
		tasks = append(tasks, func(ctx context.Context) error {
			name, got := filepath.Join(dir, f.Path), checkpoint.File{CRC32C: f.CRC32C}
			var err error
			if deferred != nil && deferred(f) {
				got.SizeBytes, err = size(s.fs, name)
			} else {
				got, err = sum(ctx, s.fs, name, 0)
			}
			switch {
			case errors.Is(err, syscall.EIO), errors.Is(err, fsys.ErrNotRegular), errors.Is(err, syscall.ELOOP):
				return fmt.Errorf("file %q: %w: %w", f.Path, checkpoint.ErrCorrupt, err)
			case err != nil:
				return err
			case got.SizeBytes != f.SizeBytes:
				return fmt.Errorf("file %q has %d bytes, want %d: %w", f.Path, got.SizeBytes, f.SizeBytes, checkpoint.ErrCorrupt)
			case got.CRC32C != f.CRC32C:
				return fmt.Errorf("file %q has checksum %s, want %s: %w", f.Path, got.CRC32C, f.CRC32C, checkpoint.ErrCorrupt)
			}
			return nil
		})
	}
	for name := range there {
		if !quarantined || name != reasonFile && path.Dir(name) != logsDir {
			return &CorruptError{id, fmt.Errorf("file %q is not in the manifest: %w", name, checkpoint.ErrCorrupt)}
		}
	}
	err = parallel(ctx, min(s.workers, 4), tasks)
	if errors.Is(err, checkpoint.ErrCorrupt) {
		return &CorruptError{id, err}
	}
	if err != nil {
		return fmt.Errorf("verify checkpoint %s: %w", id, err)
	}
	return nil
}

// parallel runs the tasks in order, several at once, and waits for them. After
// the first error it starts no more, and cancels the context of the others.
func parallel(ctx context.Context, workers int, tasks []func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	queue := make(chan func(context.Context) error)
	var wg sync.WaitGroup
	for range min(workers, len(tasks)) {
		wg.Go(func() {
			for task := range queue {
				if err := task(ctx); err != nil {
					cancel(err)
				}
			}
		})
	}
feed:
	for _, task := range tasks {
		select {
		case queue <- task:
		case <-ctx.Done():
			break feed
		}
	}
	close(queue)
	wg.Wait()
	return context.Cause(ctx)
}

// await waits for f or for ctx. In the latter case f goes on alone.
func await[T any](ctx context.Context, f func() (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		var zero T
		return zero, context.Cause(ctx)
	}
}
