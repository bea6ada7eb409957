package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

var (
	alice = checkpoint.Identity{Namespace: "default", Key: "alice", Container: "app"}
	bob   = checkpoint.Identity{Namespace: "default", Key: "bob", Container: "app"}
	noon  = time.Now().UTC().Truncate(time.Second).Add(-time.Hour)
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantIs(t testing.TB, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("got error %v, want %v", err, target)
	}
}

// onBoth runs a test on a real and on a memory file system.
func onBoth(t *testing.T, test func(t *testing.T, s *Store)) {
	t.Run("os", func(t *testing.T) { test(t, openOS(t)) })
	t.Run("mem", func(t *testing.T) {
		s, err := Open(fsys.NewMem(), "/var/lib/stasis")
		must(t, err)
		test(t, s)
	})
}

func openOS(t testing.TB) *Store {
	s, err := Open(fsys.OS{}, filepath.Join(t.TempDir(), "store"))
	must(t, err)
	return s
}

// manifestFor is the manifest of a dump n seconds after noon.
func manifestFor(i checkpoint.Identity, n int) *checkpoint.Manifest {
	at := noon.Add(time.Duration(n) * time.Second)
	return &checkpoint.Manifest{ID: checkpoint.NewID(i, at), Identity: i, CreatedAt: at, PodUID: "uid-" + i.Key, Generation: n + 1}
}

// content is what every checkpoint of these tests holds.
func content(id checkpoint.ID) map[string][]byte {
	return map[string][]byte{
		"checkpoint/pages-1.img": bytes.Repeat([]byte(id), 40),
		"checkpoint/core-1.img":  []byte("core of " + id),
		"spec.dump":              {},
		"volumes/0.layer":        []byte("layer of " + id),
	}
}

func put(f fsys.FS, path string, data []byte) error {
	w, err := f.Create(path, 0o644)
	if err != nil {
		return err
	}
	_, err = w.Write(data)
	return errors.Join(err, w.Close())
}

// fill writes content into a stage.
func fill(f fsys.FS, dir string, id checkpoint.ID) error {
	if err := f.Mkdir(filepath.Join(dir, "volumes"), 0o755); err != nil {
		return err
	}
	for name, data := range content(id) {
		if err := put(f, filepath.Join(dir, name), data); err != nil {
			return err
		}
	}
	return nil
}

// commit makes a checkpoint, or aborts.
func commit(ctx context.Context, s *Store, m *checkpoint.Manifest) error {
	g, err := s.Stage(ctx, m.ID)
	if err != nil {
		return err
	}
	if err = fill(s.fs, g.Dir(), m.ID); err == nil {
		err = g.Commit(ctx, m)
	}
	if err != nil {
		return errors.Join(err, g.Abort())
	}
	return nil
}

func mustCommit(t testing.TB, s *Store, i checkpoint.Identity, n int) checkpoint.ID {
	t.Helper()
	m := manifestFor(i, n)
	must(t, commit(t.Context(), s, m))
	return m.ID
}

// states lists the store and verifies every checkpoint in it.
func states(t testing.TB, s *Store) map[checkpoint.ID]State {
	t.Helper()
	records, err := s.List(t.Context())
	must(t, err)
	got := map[checkpoint.ID]State{}
	for _, r := range records {
		if r.Err != nil {
			t.Errorf("%s %s: %v", r.State, r.Path, r.Err)
			continue
		}
		if err := s.Verify(t.Context(), r.ID); err != nil {
			t.Errorf("%s %s: %v", r.State, r.Path, err)
		}
		got[r.ID] = r.State
	}
	templates, err := s.Templates(t.Context())
	must(t, err)
	for _, v := range templates {
		if err := s.VerifyTemplate(t.Context(), v.TemplateRef); err != nil {
			t.Errorf("template %s: %v", v.TemplateRef, err)
		}
		got[v.Version] = isTemplate
	}
	return got
}

// isTemplate is the state of a template's version in these tests.
const isTemplate State = "template"

// tidy fails if the root holds anything that Sweep should have removed. An
// owner's file alone that is torn has to stay for its time of grace.
func tidy(t testing.TB, s *Store) {
	t.Helper()
	entries, err := s.fs.ReadDir(s.root)
	must(t, err)
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ownerSuffix) {
			if o, alive, err := s.owner(s.path(e.Name())); err == nil && o == nil && alive {
				continue
			}
		}
		if strings.HasPrefix(e.Name(), stagePrefix) || strings.HasPrefix(e.Name(), trashPrefix) {
			t.Errorf("left over: %s", e.Name())
		}
	}
	must(t, s.eachTemplate(t.Context(), func(namespace, name string) error {
		entries, err := s.fs.ReadDir(s.path(templatesDir, namespace, name))
		for _, e := range entries {
			if o, alive, err := s.owner(s.path(templatesDir, namespace, name, e.Name())); !e.IsDir() && (err != nil || o != nil || !alive) {
				t.Errorf("left over: %s", e.Name())
			}
		}
		return err
	}))
	hashes, err := s.fs.ReadDir(s.path(claimedDir))
	must(t, err)
	for _, h := range hashes {
		entries, err := s.fs.ReadDir(s.path(claimedDir, h.Name()))
		must(t, err)
		for _, e := range entries {
			name := strings.TrimSuffix(e.Name(), ownerSuffix)
			for _, want := range []string{name, name + ownerSuffix} {
				if _, err := s.fs.Lstat(s.path(claimedDir, h.Name(), want)); err != nil {
					t.Errorf("claim by halves: %v", err)
				}
			}
		}
	}
}

func TestLifeOfACheckpoint(t *testing.T) {
	onBoth(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		_, err := s.Latest(ctx, alice)
		wantIs(t, err, checkpoint.ErrNotFound)

		m := manifestFor(alice, 1)
		g, err := s.Stage(ctx, m.ID)
		must(t, err)
		must(t, fill(s.fs, g.Dir(), m.ID))
		if got := states(t, s); len(got) != 0 {
			t.Errorf("a stage is visible: %v", got)
		}
		must(t, g.Commit(ctx, m))
		must(t, g.Abort()) // does nothing
		wantIs(t, g.Commit(ctx, m), checkpoint.ErrInvalid)
		old := mustCommit(t, s, alice, 0)
		other := mustCommit(t, s, bob, 5)
		tidy(t, s)

		latest, err := s.Latest(ctx, alice)
		must(t, err)
		if latest.ID != m.ID || latest.FormatVersion != checkpoint.FormatVersion {
			t.Errorf("latest is %s, format %d", latest.ID, latest.FormatVersion)
		}
		var total int64
		var names []string
		for _, f := range latest.Files {
			names = append(names, f.Path)
			total += f.SizeBytes
			if want := int64(len(content(m.ID)[f.Path])); f.SizeBytes != want {
				t.Errorf("%s: %d bytes, want %d", f.Path, f.SizeBytes, want)
			}
		}
		if want := []string{"checkpoint/core-1.img", "checkpoint/pages-1.img", "spec.dump", "volumes/0.layer"}; !slices.Equal(names, want) {
			t.Errorf("files %q, want %q", names, want)
		}
		if total == 0 || latest.Sizes.TotalBytes != total || m.Sizes.TotalBytes != total {
			t.Errorf("total %d and %d, want %d", latest.Sizes.TotalBytes, m.Sizes.TotalBytes, total)
		}
		if m.Timings.FsyncMicros <= 0 || m.Timings.CommitMicros <= 0 {
			t.Errorf("timings %+v", m.Timings)
		}

		c, err := s.Claim(ctx, m.ID, "container-1")
		must(t, err)
		must(t, c.Verify(ctx, nil))
		if c.ID() != m.ID || c.Manifest().ID != m.ID {
			t.Errorf("claimed %s, manifest of %s", c.ID(), c.Manifest().ID)
		}
		if _, err := s.fs.Lstat(filepath.Join(c.Dir(), "checkpoint", "core-1.img")); err != nil {
			t.Error(err)
		}
		_, err = s.Claim(ctx, m.ID, "container-2")
		wantIs(t, err, checkpoint.ErrBusy)
		wantIs(t, s.Remove(ctx, m.ID), checkpoint.ErrBusy)
		wantIs(t, s.Quarantine(ctx, m.ID, "", nil), checkpoint.ErrBusy)
		if latest, err := s.Latest(ctx, alice); err != nil || latest.ID != old {
			t.Errorf("latest beside a claim: %v, %v", latest, err)
		}
		records, err := s.List(ctx)
		must(t, err)
		i := slices.IndexFunc(records, func(r Record) bool { return r.State == Claimed })
		if i < 0 || records[i].Owner == nil || records[i].Owner.PID != os.Getpid() || records[i].Owner.ContainerID != "container-1" {
			t.Errorf("records %+v", records)
		}

		must(t, c.Release(ctx))
		wantIs(t, c.Release(ctx), checkpoint.ErrNotFound)
		wantIs(t, c.Consume(ctx), checkpoint.ErrNotFound)
		wantIs(t, c.Quarantine(ctx, "", nil), checkpoint.ErrNotFound)
		if got := states(t, s); got[m.ID] != Committed || len(got) != 3 {
			t.Errorf("after release: %v", got)
		}

		c, err = s.Claim(ctx, m.ID, "container-3")
		must(t, err)
		must(t, c.Consume(ctx))
		if got := states(t, s); len(got) != 2 || got[old] != Committed || got[other] != Committed {
			t.Errorf("after consume: %v", got)
		}
		_, err = s.Claim(ctx, m.ID, "container-4")
		wantIs(t, err, checkpoint.ErrNotFound)
		_, err = s.Manifest(ctx, m.ID)
		wantIs(t, err, checkpoint.ErrNotFound)

		c, err = s.Claim(ctx, old, "container-5")
		must(t, err)
		must(t, c.Quarantine(ctx, "CRIU said no", map[string][]byte{"restore.log": append(bytes.Repeat([]byte("x"), MaxLogBytes), "end"...)}))
		records, err = s.List(ctx)
		must(t, err)
		i = slices.IndexFunc(records, func(r Record) bool { return r.ID == old })
		if i < 0 || records[i].State != Quarantined || records[i].Reason != "CRIU said no" {
			t.Errorf("records %+v", records)
		}
		log, err := fsys.ReadFile(s.fs, filepath.Join(records[i].Path, "logs", "restore.log"), 1<<30)
		if err != nil || len(log) != MaxLogBytes || !bytes.HasSuffix(log, []byte("end")) {
			t.Errorf("log of %d bytes, %v", len(log), err)
		}
		must(t, s.Verify(ctx, old))
		if m, err := s.Manifest(ctx, old); err != nil || m.ID != old {
			t.Errorf("manifest %v, %v", m, err)
		}
		_, err = s.Claim(ctx, old, "")
		wantIs(t, err, checkpoint.ErrNotFound)
		must(t, s.Remove(ctx, old))
		must(t, s.Quarantine(ctx, other, "not trusted", nil))
		must(t, s.Quarantine(ctx, other, "again", nil))
		if got := states(t, s); len(got) != 1 || got[other] != Quarantined {
			t.Errorf("at the end: %v", got)
		}
		must(t, s.Remove(ctx, other))
		wantIs(t, s.Remove(ctx, other), checkpoint.ErrNotFound)
		wantIs(t, s.Quarantine(ctx, other, "", nil), checkpoint.ErrNotFound)
		for _, dir := range []string{committedDir, claimedDir, quarantineDir} {
			if entries, err := s.fs.ReadDir(s.path(dir)); err != nil || len(entries) != 0 {
				t.Errorf("%s: %v, %v", dir, entries, err)
			}
		}
		tidy(t, s)
	})
}

// TestBadIDs: an ID becomes part of a path, so each entry point checks it.
func TestBadIDs(t *testing.T) {
	onBoth(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		for _, id := range []checkpoint.ID{"", "x", "../../../../etc", checkpoint.ID(strings.Repeat("../", 14))} {
			_, stage := s.Stage(ctx, id)
			_, claim := s.Claim(ctx, id, "")
			_, manifest := s.Manifest(ctx, id)
			for _, err := range []error{stage, claim, manifest, s.Remove(ctx, id), s.Verify(ctx, id), s.Quarantine(ctx, id, "", nil)} {
				wantIs(t, err, checkpoint.ErrInvalid)
			}
		}
		_, err := s.Latest(ctx, checkpoint.Identity{Namespace: "a/b", Key: "k", Container: "c"})
		wantIs(t, err, checkpoint.ErrInvalid)
		id := mustCommit(t, s, alice, 0)
		for _, name := range []string{"../x", "a/b", ".", "..", "/"} {
			wantIs(t, s.Quarantine(ctx, id, "", map[string][]byte{name: nil}), checkpoint.ErrInvalid)
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "open"), 0o700))
	must(t, os.Chmod(filepath.Join(dir, "open"), 0o710))
	must(t, os.Mkdir(filepath.Join(dir, "good"), 0o700))
	must(t, os.Symlink("good", filepath.Join(dir, "link")))
	must(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	for _, root := range []string{filepath.Join(dir, "open"), filepath.Join(dir, "link"), filepath.Join(dir, "link") + "/", filepath.Join(dir, "file"), "relative", ""} {
		_, err := Open(fsys.OS{}, root)
		wantIs(t, err, checkpoint.ErrInvalid)
	}
	// A link above the root is the administrator's business.
	s, err := Open(fsys.OS{}, filepath.Join(dir, "link", "deep", "store"))
	must(t, err)
	mustCommit(t, s, alice, 0)
	if st, err := os.Stat(s.Root()); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("root %v, %v", st, err)
	}
	if n, err := s.FreeBytes(); n <= 0 || err != nil {
		t.Errorf("free: %d, %v", n, err)
	}
}

func TestCommitModes(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	s := openOS(t)
	m := manifestFor(alice, 0)
	g, err := s.Stage(t.Context(), m.ID)
	must(t, err)
	must(t, os.MkdirAll(filepath.Join(g.Dir(), "a", "b"), 0o777))
	must(t, os.WriteFile(filepath.Join(g.Dir(), "a", "b", "f"), []byte("x"), 0o666))
	must(t, os.Chmod(g.Dir(), 0o755))
	must(t, g.Commit(t.Context(), m))
	must(t, filepath.WalkDir(s.Root(), func(path string, d os.DirEntry, err error) error {
		must(t, err)
		st, err := d.Info()
		must(t, err)
		if want := map[bool]os.FileMode{true: os.ModeDir | 0o700, false: 0o600}[d.IsDir()]; st.Mode() != want {
			t.Errorf("%s: mode %v, want %v", path, st.Mode(), want)
		}
		return nil
	}))
}

// TestCommitRefuses: only files and directories can be committed, and a refused
// stage is still there to be mended or aborted.
func TestCommitRefuses(t *testing.T) {
	for name, strange := range map[string]func(path string) error{
		"symbolic link": func(p string) error { return os.Symlink("spec.dump", p) },
		"dangling link": func(p string) error { return os.Symlink("/nowhere", p) },
		"pipe":          func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"socket":        func(p string) error { return syscall.Mknod(p, syscall.S_IFSOCK|0o600, 0) },
		"too deep":      func(p string) error { return os.MkdirAll(p+strings.Repeat("/d", maxDepth+1), 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			s := openOS(t)
			m := manifestFor(alice, 0)
			g, err := s.Stage(t.Context(), m.ID)
			must(t, err)
			must(t, fill(s.fs, g.Dir(), m.ID))
			must(t, strange(filepath.Join(g.Dir(), "checkpoint", "strange")))
			wantIs(t, g.Commit(t.Context(), m), checkpoint.ErrInvalid)
			if got := states(t, s); len(got) != 0 || m.Files != nil {
				t.Errorf("visible: %v, files %v", got, m.Files)
			}
			must(t, os.RemoveAll(filepath.Join(g.Dir(), "checkpoint", "strange")))
			must(t, g.Commit(t.Context(), m))
			if got := states(t, s); got[m.ID] != Committed {
				t.Errorf("after mending: %v", got)
			}
		})
	}
	t.Run("name that is not UTF-8", func(t *testing.T) {
		s := openOS(t)
		m := manifestFor(alice, 0)
		g, err := s.Stage(t.Context(), m.ID)
		must(t, err)
		if err := os.WriteFile(filepath.Join(g.Dir(), "\xff"), nil, 0o600); err != nil {
			t.Fatalf("file system does not take the name: %v", err)
		}
		wantIs(t, g.Commit(t.Context(), m), checkpoint.ErrInvalid)
	})
	t.Run("manifest", func(t *testing.T) {
		s := openOS(t)
		m := manifestFor(alice, 0)
		g, err := s.Stage(t.Context(), m.ID)
		must(t, err)
		other := manifestFor(alice, 1)
		wantIs(t, g.Commit(t.Context(), other), checkpoint.ErrInvalid)
		wrong := *m
		wrong.Identity = bob
		if err := g.Commit(t.Context(), &wrong); err == nil {
			t.Error("committed under a wrong identity")
		}
		must(t, g.Abort())
		must(t, g.Abort())
		if err := g.Commit(t.Context(), m); err == nil {
			t.Error("committed after abort")
		}
		if got := states(t, s); len(got) != 0 {
			t.Errorf("visible: %v", got)
		}
		tidy(t, s)
	})
}

// TestCommitStopsWaiting: a disk that hangs must not hold a frozen container.
func TestCommitStopsWaiting(t *testing.T) {
	for _, slow := range []string{"sync", "syncdir", "read", "readdir"} {
		t.Run(slow, func(t *testing.T) {
			var armed atomic.Bool
			hang := make(chan struct{})
			s, err := Open(fsys.Hook(fsys.NewMem(), func(op, path string) error {
				if armed.Load() && op == slow {
					<-hang
				}
				return nil
			}), "/s")
			must(t, err)
			m := manifestFor(alice, 0)
			g, err := s.Stage(t.Context(), m.ID)
			must(t, err)
			must(t, fill(s.fs, g.Dir(), m.ID))
			armed.Store(true)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			wantIs(t, g.Commit(ctx, m), context.DeadlineExceeded)
			armed.Store(false)
			must(t, g.Abort())
			close(hang)
			if got := states(t, s); len(got) != 0 {
				t.Errorf("visible: %v", got)
			}
		})
	}
	t.Run("done before", func(t *testing.T) {
		s := openOS(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		wantIs(t, commit(ctx, s, manifestFor(alice, 0)), context.Canceled)
		if got := states(t, s); len(got) != 0 {
			t.Errorf("visible: %v", got)
		}
		tidy(t, s)
	})
}

// TestDamage: whatever happens to a file, Verify sees and names it.
func TestDamage(t *testing.T) {
	pages := "checkpoint/pages-1.img"
	for name, test := range map[string]struct {
		damage func(dir string) error
		names  string
		latest bool // Latest, which reads the manifest only, sees it too
	}{
		"bit flipped": {func(dir string) error {
			data, err := os.ReadFile(filepath.Join(dir, pages))
			data[len(data)/2] ^= 1
			return errors.Join(err, os.WriteFile(filepath.Join(dir, pages), data, 0o600))
		}, pages, false},
		"truncated": {func(dir string) error { return os.Truncate(filepath.Join(dir, pages), 17) }, pages, false},
		"longer":    {func(dir string) error { return os.Truncate(filepath.Join(dir, pages), 1<<20) }, pages, false},
		"missing":   {func(dir string) error { return os.Remove(filepath.Join(dir, pages)) }, pages, false},
		"extra":     {func(dir string) error { return os.WriteFile(filepath.Join(dir, "checkpoint/x"), nil, 0o600) }, "checkpoint/x", false},
		"reason":    {func(dir string) error { return os.WriteFile(filepath.Join(dir, reasonFile), nil, 0o600) }, reasonFile, false},
		"link": {func(dir string) error {
			p := filepath.Join(dir, pages)
			return errors.Join(os.Rename(p, dir+".moved"), os.Symlink(dir+".moved", p))
		}, pages, false},
		"pipe": {func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, pages)), syscall.Mkfifo(filepath.Join(dir, pages), 0o600))
		}, pages, false},
		"directory": {func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, pages)), os.Mkdir(filepath.Join(dir, pages), 0o700))
		}, pages, false},
		"manifest missing": {func(dir string) error { return os.Remove(filepath.Join(dir, checkpoint.ManifestFile)) }, "manifest", true},
		"manifest empty":   {func(dir string) error { return os.Truncate(filepath.Join(dir, checkpoint.ManifestFile), 0) }, "manifest", true},
		"manifest torn":    {func(dir string) error { return os.Truncate(filepath.Join(dir, checkpoint.ManifestFile), 300) }, "manifest", true},
		"manifest huge":    {func(dir string) error { return os.Truncate(filepath.Join(dir, checkpoint.ManifestFile), 1<<40) }, "manifest", true},
		"manifest is a pipe": {func(dir string) error {
			p := filepath.Join(dir, checkpoint.ManifestFile)
			return errors.Join(os.Remove(p), syscall.Mkfifo(p, 0o600))
		}, "manifest", true},
		"manifest is a link": {func(dir string) error {
			p := filepath.Join(dir, checkpoint.ManifestFile)
			return errors.Join(os.Rename(p, dir+".moved"), os.Symlink(dir+".moved", p))
		}, "manifest", true},
		"manifest of another": {func(dir string) error {
			m := manifestFor(alice, 7)
			m.FormatVersion = checkpoint.FormatVersion
			data, err := m.Encode()
			return errors.Join(err, os.WriteFile(filepath.Join(dir, checkpoint.ManifestFile), data, 0o600))
		}, "manifest", true},
	} {
		t.Run(name, func(t *testing.T) {
			s := openOS(t)
			ctx := t.Context()
			old := mustCommit(t, s, alice, 0)
			id := mustCommit(t, s, alice, 1)
			must(t, s.Verify(ctx, id))
			must(t, test.damage(s.committedPath(id)))
			// It must end, too: a pipe has no writer.
			err := s.Verify(ctx, id)
			var corrupt *CorruptError
			if !errors.As(err, &corrupt) || corrupt.ID != id || !errors.Is(err, checkpoint.ErrCorrupt) || !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), test.names) {
				t.Errorf("verify: %v", err)
			}
			m, err := s.Latest(ctx, alice)
			if !test.latest {
				must(t, err)
				c, err := s.Claim(ctx, m.ID, "c")
				must(t, err)
				wantIs(t, c.Verify(ctx, nil), checkpoint.ErrCorrupt)
				must(t, c.Quarantine(ctx, "damaged", nil))
			} else {
				if !errors.As(err, &corrupt) || corrupt.ID != id {
					t.Errorf("latest: %v", err)
				}
				_, err = s.Claim(ctx, id, "c")
				wantIs(t, err, checkpoint.ErrCorrupt)
				records, err := s.List(ctx)
				must(t, err)
				i := slices.IndexFunc(records, func(r Record) bool { return r.ID == id })
				if len(records) < 2 || i < 0 || records[i].State != Corrupt || !errors.Is(records[i].Err, checkpoint.ErrCorrupt) {
					t.Errorf("list: %+v", records)
				}
				must(t, s.Quarantine(ctx, id, "damaged", nil))
			}
			if m, err := s.Latest(ctx, alice); err != nil || m.ID != old {
				t.Errorf("latest after quarantine: %v, %v", m, err)
			}
			must(t, s.Remove(ctx, id))
		})
	}
}

// TestStrangers: things in the store that are no checkpoints do no harm.
func TestStrangers(t *testing.T) {
	s := openOS(t)
	ctx := t.Context()
	id := mustCommit(t, s, alice, 0)
	misplaced := checkpoint.NewID(bob, noon)
	for _, p := range []string{
		s.path(committedDir, "notes.txt"), s.path(committedDir, alice.Hash(), "x"), s.path(committedDir, alice.Hash(), string(checkpoint.NewID(alice, noon.Add(time.Minute)))),
		s.path(claimedDir, "x"), s.path(quarantineDir, "x"), s.path(".stage-x.owner"), s.path("events.jsonl"),
	} {
		must(t, os.WriteFile(p, []byte("x"), 0o600))
	}
	must(t, os.Symlink("/etc", s.path(committedDir, "0123456789abcdef")))
	must(t, os.Mkdir(s.path(committedDir, alice.Hash(), string(misplaced)), 0o700))
	records, err := s.List(ctx)
	must(t, err)
	strangers := 0
	for _, r := range records {
		if r.ID == "" {
			strangers++
			wantIs(t, r.Err, checkpoint.ErrCorrupt)
		}
	}
	if strangers != 7 || len(records) != 8 {
		t.Errorf("%d records, %d strangers: %+v", len(records), strangers, records)
	}
	if m, err := s.Latest(ctx, alice); err != nil || m.ID != id {
		t.Errorf("latest: %v, %v", m, err)
	}
	_, err = s.Sweep(ctx)
	must(t, err)
	removed, err := s.GC(ctx, Policy{TTL: time.Nanosecond}, false)
	if err != nil || len(removed) != 1 || removed[0].ID != id {
		t.Errorf("gc: %v, %v", removed, err)
	}
	if _, err := os.Stat(s.path(committedDir, "notes.txt")); err != nil {
		t.Error(err)
	}
}

// TestSameSecond: IDs tell seconds apart, manifests the rest.
func TestSameSecond(t *testing.T) {
	onBoth(t, func(t *testing.T, s *Store) {
		var last checkpoint.ID
		for i := range 10 {
			m := manifestFor(alice, 1)
			m.CreatedAt = m.CreatedAt.Add(time.Duration(i) * time.Millisecond)
			must(t, commit(t.Context(), s, m))
			last = m.ID
		}
		mustCommit(t, s, alice, 0)
		if m, err := s.Latest(t.Context(), alice); err != nil || m.ID != last {
			t.Errorf("latest %v, %v, want %s", m, err, last)
		}
	})
}

func TestOneWinner(t *testing.T) {
	onBoth(t, func(t *testing.T, s *Store) {
		id := mustCommit(t, s, alice, 0)
		for range 5 {
			var wg sync.WaitGroup
			claims := make(chan *Claim, 16)
			for i := range 16 {
				wg.Go(func() {
					c, err := s.Claim(t.Context(), id, fmt.Sprint(i))
					if err == nil {
						claims <- c
					} else if !errors.Is(err, checkpoint.ErrBusy) {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if len(claims) != 1 {
				t.Fatalf("%d winners", len(claims))
			}
			c := <-claims
			must(t, c.Verify(t.Context(), nil))
			must(t, c.Release(t.Context()))
		}
	})
}

// TestTogether lets everything happen at once on few identities, whose
// directories come and go. Nothing may be lost, doubled or half there.
func TestTogether(t *testing.T) {
	onBoth(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		var made, consumed atomic.Int64
		var wg sync.WaitGroup
		for w := range 8 {
			identity := []checkpoint.Identity{alice, bob}[w%2]
			wg.Go(func() {
				for n := range 12 {
					if err := commit(ctx, s, manifestFor(identity, w*100+n)); err != nil {
						t.Error(err)
						return
					}
					made.Add(1)
					m, err := s.Latest(ctx, identity)
					if errors.Is(err, checkpoint.ErrNotFound) || errors.Is(err, checkpoint.ErrBusy) {
						continue
					}
					if err != nil {
						t.Error(err)
						return
					}
					c, err := s.Claim(ctx, m.ID, "c")
					if errors.Is(err, checkpoint.ErrNotFound) || errors.Is(err, checkpoint.ErrBusy) {
						continue
					}
					if err != nil {
						t.Error(err)
						return
					}
					if err := c.Verify(ctx, nil); err != nil {
						t.Error(err)
					}
					if n%3 == 0 {
						err = c.Release(ctx)
					} else if err = c.Consume(ctx); err == nil {
						consumed.Add(1)
					}
					if err != nil {
						t.Error(err)
					}
					if _, err := s.List(ctx); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Go(func() {
			for range 10 {
				if _, err := s.Sweep(ctx); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Wait()
		got := states(t, s)
		if int64(len(got)) != made.Load()-consumed.Load() || consumed.Load() == 0 {
			t.Errorf("%d left of %d made and %d consumed", len(got), made.Load(), consumed.Load())
		}
		tidy(t, s)
	})
}

// TestLatestIsCheap: its cost does not depend on how much is stored.
func TestLatestIsCheap(t *testing.T) {
	mem := fsys.NewMem()
	s, err := Open(mem, "/s")
	must(t, err)
	for i := range 2000 {
		fakeRecord(t, mem, s, checkpoint.Identity{Namespace: "n", Key: fmt.Sprint(i), Container: "c"}, i)
	}
	var ops []string
	s.fs = fsys.Hook(mem, func(op, path string) error { ops = append(ops, op); return nil })
	_, err = s.Latest(t.Context(), checkpoint.Identity{Namespace: "n", Key: "1234", Container: "c"})
	must(t, err)
	if len(ops) > 8 {
		t.Errorf("%d operations: %q", len(ops), ops)
	}
}

// fakeRecord makes a committed checkpoint of a manifest alone, unsynced.
func fakeRecord(t testing.TB, f fsys.FS, s *Store, i checkpoint.Identity, n int) {
	m := manifestFor(i, n)
	m.FormatVersion = checkpoint.FormatVersion
	data, err := m.Encode()
	must(t, err)
	must(t, f.Mkdir(filepath.Dir(s.committedPath(m.ID)), 0o700))
	must(t, f.Mkdir(s.committedPath(m.ID), 0o700))
	must(t, put(f, filepath.Join(s.committedPath(m.ID), checkpoint.ManifestFile), data))
}

func BenchmarkLatest10000(b *testing.B) {
	s := openOS(b)
	for i := range 10000 {
		fakeRecord(b, s.fs, s, checkpoint.Identity{Namespace: "n", Key: fmt.Sprint(i), Container: "c"}, i)
	}
	n := 0
	for b.Loop() {
		n = (n + 7919) % 10000
		if _, err := s.Latest(b.Context(), checkpoint.Identity{Namespace: "n", Key: fmt.Sprint(n), Container: "c"}); err != nil {
			b.Fatal(err)
		}
	}
}

// TestBlocks: a large file of memory has checksums of its blocks, each of which
// finds damage there, and a verification that leaves it to them sees no more than
// its size.
func TestBlocks(t *testing.T) {
	onBoth(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		const name = "pages-7.img"
		data := make([]byte, 1<<20+12345)
		for i := range data {
			data[i] = byte(i * i >> 7)
		}
		m := manifestFor(alice, 1)
		g, err := s.Stage(ctx, m.ID)
		must(t, err)
		must(t, fsys.WriteFile(s.fs, filepath.Join(g.Dir(), checkpoint.ImageDir, name), data))
		must(t, fsys.WriteFile(s.fs, filepath.Join(g.Dir(), checkpoint.ImageDir, "pages-8.img"), data[:1<<20-1]))
		must(t, fsys.WriteFile(s.fs, filepath.Join(g.Dir(), checkpoint.RootfsDiffFile), data))
		must(t, g.Commit(ctx, m))

		c, err := s.Claim(ctx, m.ID, "c")
		must(t, err)
		files := c.Manifest().Blocks()
		f := files[name]
		if len(files) != 1 || f.Blocks == nil {
			t.Fatalf("blocks of %v", files)
		}
		must(t, f.Blocks.Check(0, data))
		must(t, f.Blocks.Check(16, data[1<<20:]))
		asked := 0
		deferred := func(f checkpoint.File) bool { asked++; return f.Blocks != nil }
		must(t, c.Verify(ctx, nil))
		must(t, c.Verify(ctx, deferred))
		if asked != 3 {
			t.Errorf("asked for %d files", asked)
		}

		p := filepath.Join(c.Dir(), checkpoint.ImageDir, name)
		rewrite := func(data []byte) {
			t.Helper()
			must(t, s.fs.Remove(p))
			must(t, fsys.WriteFile(s.fs, p, data))
		}
		data[70000] ^= 1
		rewrite(data)
		must(t, c.Verify(ctx, deferred))
		wantIs(t, c.Verify(ctx, nil), checkpoint.ErrCorrupt)
		wantIs(t, f.Blocks.Check(1, data[1<<16:2<<16]), checkpoint.ErrCorrupt)
		must(t, f.Blocks.Check(0, data[:1<<16]))
		rewrite(data[:len(data)-1])
		wantIs(t, c.Verify(ctx, deferred), checkpoint.ErrCorrupt)
		must(t, c.Release(ctx))
	})
}
