package fsys_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

func write(t testing.TB, f fsys.FS, path, data string) {
	t.Helper()
	w, err := f.Create(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(data)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func read(f fsys.FS, path string) (string, error) {
	r, err := f.Open(path)
	if err != nil {
		return "", err
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	return string(data), err
}

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

// TestContract is what the store relies on, whatever lies below it.
func TestContract(t *testing.T) {
	mem := fsys.NewMem()
	must(t, mem.Mkdir("/sub", 0o700))
	nothing := func(op, path string) error { return nil }
	for name, test := range map[string]struct {
		fs   fsys.FS
		root string
	}{
		"os":     {fsys.OS{}, t.TempDir()},
		"mem":    {mem, "/sub"},
		"hooked": {fsys.Hook(fsys.NewMem(), nothing), "/"},
	} {
		t.Run(name, func(t *testing.T) { testContract(t, test.fs, test.root) })
	}
}

func testContract(t *testing.T, f fsys.FS, root string) {
	p := func(elem ...string) string { return filepath.Join(root, filepath.Join(elem...)) }
	sub := func(name string, test func(t *testing.T)) {
		must(t, f.Mkdir(p(name), 0o700))
		t.Run(name, test)
	}

	sub("mkdir", func(t *testing.T) {
		old := syscall.Umask(0o077)
		defer syscall.Umask(old)
		must(t, f.Mkdir(p("mkdir", "d"), 0o755))
		st, err := f.Lstat(p("mkdir", "d"))
		must(t, err)
		if st.Mode() != fs.ModeDir|0o755 || !st.IsDir() || st.Name() != "d" {
			t.Errorf("got %v %q", st.Mode(), st.Name())
		}
		wantIs(t, f.Mkdir(p("mkdir", "d"), 0o700), fs.ErrExist)
		wantIs(t, f.Mkdir(p("mkdir", "missing", "d"), 0o700), fs.ErrNotExist)
	})

	sub("file", func(t *testing.T) {
		name := p("file", "f")
		w, err := f.Create(name, 0o640)
		must(t, err)
		for _, part := range []string{"one ", "", "two"} {
			n, err := w.Write([]byte(part))
			if n != len(part) || err != nil {
				t.Errorf("wrote %d bytes: %v", n, err)
			}
		}
		if _, err := w.Read(make([]byte, 1)); err == nil {
			t.Error("read from a file open for writing")
		}
		must(t, w.Sync())
		must(t, w.Close())
		wantIs(t, w.Close(), fs.ErrClosed)
		if got, err := read(f, name); got != "one two" || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
		st, err := f.Lstat(name)
		must(t, err)
		if st.Mode() != 0o640 || st.Size() != 7 || time.Since(st.ModTime()).Abs() > time.Minute {
			t.Errorf("got %v, %d bytes, %v", st.Mode(), st.Size(), st.ModTime())
		}
		_, err = f.Create(name, 0o600)
		wantIs(t, err, fs.ErrExist)
		_, err = f.Create(p("file", "f", "g"), 0o600)
		wantIs(t, err, syscall.ENOTDIR)

		r, err := f.Open(name)
		must(t, err)
		if _, err := r.Write([]byte("x")); err == nil {
			t.Error("wrote to a file open for reading")
		}
		must(t, r.Sync())
		must(t, r.Close())
		if _, err := r.Read(make([]byte, 1)); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("read after close: %v", err)
		}
	})

	sub("open", func(t *testing.T) {
		_, err := f.Open(p("open", "missing"))
		wantIs(t, err, fs.ErrNotExist)
		_, err = f.Open(p("open"))
		wantIs(t, err, fsys.ErrNotRegular)
	})

	sub("chmod", func(t *testing.T) {
		write(t, f, p("chmod", "f"), "x")
		must(t, f.Mkdir(p("chmod", "d"), 0o755))
		must(t, f.Chmod(p("chmod", "f"), 0o400))
		must(t, f.Chmod(p("chmod", "d"), 0o700))
		for name, want := range map[string]fs.FileMode{"f": 0o400, "d": fs.ModeDir | 0o700} {
			if st, err := f.Lstat(p("chmod", name)); err != nil || st.Mode() != want {
				t.Errorf("%s: mode %v, %v", name, st.Mode(), err)
			}
		}
		wantIs(t, f.Chmod(p("chmod", "missing"), 0o600), fs.ErrNotExist)
	})

	sub("readdir", func(t *testing.T) {
		write(t, f, p("readdir", "b"), "")
		must(t, f.Mkdir(p("readdir", "a"), 0o700))
		write(t, f, p("readdir", "c"), "")
		entries, err := f.ReadDir(p("readdir"))
		must(t, err)
		var got []string
		for _, e := range entries {
			got = append(got, fmt.Sprintf("%s %v %v", e.Name(), e.IsDir(), e.Type().IsRegular()))
		}
		if want := []string{"a true false", "b false true", "c false true"}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		_, err = f.ReadDir(p("readdir", "missing"))
		wantIs(t, err, fs.ErrNotExist)
		_, err = f.ReadDir(p("readdir", "b"))
		wantIs(t, err, syscall.ENOTDIR)
	})

	sub("rename", func(t *testing.T) {
		must(t, f.Mkdir(p("rename", "a"), 0o700))
		must(t, f.Mkdir(p("rename", "b"), 0o700))
		must(t, f.Mkdir(p("rename", "empty"), 0o700))
		write(t, f, p("rename", "a", "f"), "content")
		write(t, f, p("rename", "g"), "other")
		wantIs(t, f.Rename(p("rename", "a"), p("rename", "empty")), fs.ErrExist)
		wantIs(t, f.Rename(p("rename", "a", "f"), p("rename", "g")), fs.ErrExist)
		wantIs(t, f.Rename(p("rename", "missing"), p("rename", "x")), fs.ErrNotExist)
		wantIs(t, f.Rename(p("rename", "a"), p("rename", "missing", "x")), fs.ErrNotExist)
		must(t, f.Rename(p("rename", "a"), p("rename", "b", "a2")))
		if got, err := read(f, p("rename", "b", "a2", "f")); got != "content" || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
		_, err := f.Lstat(p("rename", "a"))
		wantIs(t, err, fs.ErrNotExist)
	})

	sub("remove", func(t *testing.T) {
		must(t, f.Mkdir(p("remove", "d"), 0o700))
		must(t, f.Mkdir(p("remove", "d", "e"), 0o700))
		write(t, f, p("remove", "d", "e", "f"), "x")
		wantIs(t, f.Remove(p("remove", "d", "e")), syscall.ENOTEMPTY)
		wantIs(t, f.Remove(p("remove", "missing")), fs.ErrNotExist)
		must(t, f.Remove(p("remove", "d", "e", "f")))
		must(t, f.Remove(p("remove", "d", "e")))
		write(t, f, p("remove", "d", "g"), "x")
		must(t, f.RemoveAll(p("remove", "d")))
		must(t, f.RemoveAll(p("remove", "d")))
		_, err := f.Lstat(p("remove", "d"))
		wantIs(t, err, fs.ErrNotExist)
	})

	sub("sync", func(t *testing.T) {
		must(t, f.SyncDir(p("sync")))
		wantIs(t, f.SyncDir(p("sync", "missing")), fs.ErrNotExist)
		write(t, f, p("sync", "f"), "")
		wantIs(t, f.SyncDir(p("sync", "f")), syscall.ENOTDIR)
	})

	sub("lock", func(t *testing.T) {
		name := p("lock", "l")
		_, err := f.Lock(t.Context(), name)
		wantIs(t, err, fs.ErrNotExist)
		_, err = f.Lock(t.Context(), p("lock"))
		if err == nil {
			t.Error("locked a directory")
		}
		write(t, f, name, "")
		l, err := f.Lock(t.Context(), name)
		must(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		_, err = f.Lock(ctx, name)
		wantIs(t, err, context.DeadlineExceeded)

		second := make(chan error)
		go func() {
			l, err := f.Lock(t.Context(), name)
			if err == nil {
				err = l.Close()
			}
			second <- err
		}()
		select {
		case err := <-second:
			t.Fatalf("a second holder: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
		must(t, l.Close())
		must(t, <-second)
	})

	sub("free", func(t *testing.T) {
		if n, err := f.FreeBytes(p("free")); n <= 0 || err != nil {
			t.Errorf("got %d, %v", n, err)
		}
		_, err := f.FreeBytes(p("free", "missing"))
		wantIs(t, err, fs.ErrNotExist)
	})
}

// TestOSStrangeFiles: what a hostile or confused writer may have put there.
func TestOSStrangeFiles(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "target"), []byte("secret"), 0o644))
	must(t, os.Symlink("target", filepath.Join(dir, "link")))
	must(t, os.Symlink(".", filepath.Join(dir, "dirlink")))
	must(t, syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	f := fsys.OS{}

	_, err := f.Open(filepath.Join(dir, "link"))
	wantIs(t, err, syscall.ELOOP)
	_, err = f.Open(filepath.Join(dir, "fifo")) // must not wait for a writer
	wantIs(t, err, fsys.ErrNotRegular)
	_, err = f.Create(filepath.Join(dir, "link"), 0o600)
	wantIs(t, err, fs.ErrExist)
	_, err = f.ReadDir(filepath.Join(dir, "dirlink"))
	if err == nil {
		t.Error("listed a directory through a link")
	}
	if err := f.Chmod(filepath.Join(dir, "link"), 0o666); err == nil {
		t.Error("changed a mode through a link")
	}
	wantIs(t, f.Chmod(filepath.Join(dir, "fifo"), 0o666), fsys.ErrNotRegular)
	_, err = f.Lock(t.Context(), filepath.Join(dir, "link"))
	wantIs(t, err, syscall.ELOOP)
	must(t, f.RemoveAll(filepath.Join(dir, "dirlink")))
	if got, err := read(f, filepath.Join(dir, "target")); got != "secret" || err != nil {
		t.Errorf("target is now %q, %v", got, err)
	}
}

// TestMemCrash: what is durable is kept, what is not is kept by chance.
func TestMemCrash(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	base := func(t *testing.T) *fsys.Mem {
		m := fsys.NewMem()
		must(t, m.Mkdir("/a", 0o700))
		must(t, m.Mkdir("/b", 0o700))
		must(t, m.SyncDir("/"))
		return m
	}
	syncFile := func(t *testing.T, m *fsys.Mem, path string) {
		f, err := m.Open(path)
		must(t, err)
		must(t, f.Sync())
		must(t, f.Close())
	}
	long := string(bytes.Repeat([]byte("0123456789abcdef"), 256))

	t.Run("nothing synced", func(t *testing.T) {
		m := base(t)
		write(t, m, "/a/f", long)
		_, err := read(m.CrashClone(0, rnd), "/a/f")
		wantIs(t, err, fs.ErrNotExist)
		if got, err := read(m.CrashClone(1, rnd), "/a/f"); got != long || err != nil {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
	t.Run("name without content", func(t *testing.T) {
		m := base(t)
		write(t, m, "/a/f", long)
		must(t, m.SyncDir("/a"))
		if got, err := read(m.CrashClone(0, rnd), "/a/f"); got != "" || err != nil {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		torn := 0
		for range 100 {
			got, err := read(m.CrashClone(0.5, rnd), "/a/f")
			must(t, err)
			if got != "" && got != long {
				torn++
			}
		}
		if torn < 20 {
			t.Errorf("only %d of 100 crashes tore the file", torn)
		}
	})
	t.Run("content without name", func(t *testing.T) {
		m := base(t)
		write(t, m, "/a/f", long)
		syncFile(t, m, "/a/f")
		_, err := read(m.CrashClone(0, rnd), "/a/f")
		wantIs(t, err, fs.ErrNotExist)
		there := 0
		for range 100 {
			if got, err := read(m.CrashClone(0.5, rnd), "/a/f"); err == nil && got == long {
				there++
			}
		}
		if there < 20 || there > 80 {
			t.Errorf("kept by %d of 100 crashes", there)
		}
	})
	t.Run("durable", func(t *testing.T) {
		m := base(t)
		write(t, m, "/a/f", long)
		syncFile(t, m, "/a/f")
		must(t, m.SyncDir("/a"))
		must(t, m.Chmod("/a/f", 0o644))
		must(t, m.Remove("/a/f"))
		if got, err := read(m.CrashClone(0, rnd), "/a/f"); got != long || err != nil {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if st, err := m.CrashClone(0, rnd).Lstat("/a/f"); err != nil || st.Mode() != 0o600 {
			t.Errorf("%v, %v", st, err)
		}
		must(t, m.SyncDir("/a"))
		_, err := read(m.CrashClone(0, rnd), "/a/f")
		wantIs(t, err, fs.ErrNotExist)
	})
	t.Run("rename is atomic", func(t *testing.T) {
		for _, synced := range []string{"", "/a", "/b"} {
			m := base(t)
			write(t, m, "/a/f", long)
			syncFile(t, m, "/a/f")
			must(t, m.SyncDir("/a"))
			must(t, m.Rename("/a/f", "/b/g"))
			if synced != "" {
				must(t, m.SyncDir(synced))
			}
			for range 50 {
				c := m.CrashClone(0.5, rnd)
				_, errOld := read(c, "/a/f")
				_, errNew := read(c, "/b/g")
				if (errOld == nil) == (errNew == nil) {
					t.Fatalf("synced %q: old name %v, new name %v", synced, errOld, errNew)
				}
				if synced != "" && errNew != nil {
					t.Fatalf("synced %q: new name %v", synced, errNew)
				}
			}
		}
	})
	t.Run("parent not synced", func(t *testing.T) {
		m := base(t)
		must(t, m.Mkdir("/a/d", 0o700))
		write(t, m, "/a/d/f", long)
		syncFile(t, m, "/a/d/f")
		must(t, m.SyncDir("/a/d"))
		_, err := read(m.CrashClone(0, rnd), "/a/d/f")
		wantIs(t, err, fs.ErrNotExist)
	})
	t.Run("a clone is separate", func(t *testing.T) {
		m := base(t)
		c := m.CrashClone(1, rnd)
		write(t, m, "/a/f", "x")
		write(t, c, "/a/g", "x")
		_, err := m.Lstat("/a/g")
		wantIs(t, err, fs.ErrNotExist)
		_, err = c.Lstat("/a/f")
		wantIs(t, err, fs.ErrNotExist)
	})
}

func TestHookFails(t *testing.T) {
	m := fsys.NewMem()
	hook, reached := fsys.FailNth(2, syscall.ENOSPC)
	f := fsys.Hook(m, hook)
	must(t, f.Mkdir("/d", 0o700))
	w, err := f.Create("/d/f", 0o600)
	must(t, err)
	if reached() {
		t.Error("reached before")
	}
	n, err := w.Write([]byte("abcd"))
	wantIs(t, err, syscall.ENOSPC)
	if n != 2 || !reached() {
		t.Errorf("wrote %d bytes, reached %v", n, reached())
	}
	must(t, w.Close())
	if got, err := read(m, "/d/f"); got != "ab" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}

	// Each operation calls the hook, under its name, and obeys it.
	var ops []string
	fail := errors.New("no")
	f = fsys.Hook(m, func(op, path string) error { ops = append(ops, op); return fail })
	_, e1 := f.Create("/d/g", 0o600)
	_, e2 := f.Open("/d/f")
	_, e3 := f.Lstat("/d")
	_, e4 := f.ReadDir("/d")
	_, e5 := f.Lock(t.Context(), "/d/f")
	_, e6 := f.FreeBytes("/d")
	for i, err := range []error{e1, e2, e3, e4, e5, e6, f.Mkdir("/e", 0o700), f.Chmod("/d", 0o755),
		f.Rename("/d", "/e"), f.Remove("/d/f"), f.RemoveAll("/d"), f.SyncDir("/d")} {
		if err != fail {
			t.Errorf("operation %d: %v", i, err)
		}
	}
	want := []string{"create", "open", "lstat", "readdir", "lock", "free", "mkdir", "chmod", "rename", "remove", "removeall", "syncdir"}
	if !slices.Equal(ops, want) {
		t.Errorf("got %q", ops)
	}
}
