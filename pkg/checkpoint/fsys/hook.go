package fsys

import (
	"context"
	"io"
	"io/fs"
	"sync/atomic"
)

// Hook wraps a file system: before each operation, those on open files
// included, it calls f with the operation's name ("mkdir", "create", "open",
// "lstat", "readdir", "chmod", "rename", "remove", "removeall", "syncdir",
// "lock", "free", "read", "write", "sync", "close") and path. An error that f
// returns becomes the operation's, which then has no effect, save that a
// failing write writes half of its data and a failing close closes. f may be
// called concurrently.
func Hook(inner FS, f func(op, path string) error) FS { return &hooked{inner, f} }

// FailNth is a function for [Hook] that lets the n-th operation, counted from
// 0, fail with err. The second result reports whether that has happened.
func FailNth(n int64, err error) (func(op, path string) error, func() bool) {
	var count atomic.Int64
	hook := func(op, path string) error {
		if count.Add(1)-1 != n {
			return nil
		}
		return &fs.PathError{Op: op, Path: path, Err: err}
	}
	return hook, func() bool { return count.Load() > n }
}

type hooked struct {
	inner FS
	f     func(op, path string) error
}

func (h *hooked) Mkdir(path string, mode fs.FileMode) error {
	if err := h.f("mkdir", path); err != nil {
		return err
	}
	return h.inner.Mkdir(path, mode)
}

func (h *hooked) Create(path string, mode fs.FileMode) (File, error) {
	if err := h.f("create", path); err != nil {
		return nil, err
	}
	return h.wrap(path)(h.inner.Create(path, mode))
}

func (h *hooked) Open(path string) (File, error) {
	if err := h.f("open", path); err != nil {
		return nil, err
	}
	return h.wrap(path)(h.inner.Open(path))
}

func (h *hooked) wrap(path string) func(File, error) (File, error) {
	return func(f File, err error) (File, error) {
		if err != nil {
			return nil, err
		}
		return &hookedFile{f, h.f, path}, nil
	}
}

func (h *hooked) Lstat(path string) (fs.FileInfo, error) {
	if err := h.f("lstat", path); err != nil {
		return nil, err
	}
	return h.inner.Lstat(path)
}

func (h *hooked) ReadDir(path string) ([]fs.DirEntry, error) {
	if err := h.f("readdir", path); err != nil {
		return nil, err
	}
	return h.inner.ReadDir(path)
}

func (h *hooked) Chmod(path string, mode fs.FileMode) error {
	if err := h.f("chmod", path); err != nil {
		return err
	}
	return h.inner.Chmod(path, mode)
}

func (h *hooked) Rename(from, to string) error {
	if err := h.f("rename", from); err != nil {
		return err
	}
	return h.inner.Rename(from, to)
}

func (h *hooked) Remove(path string) error {
	if err := h.f("remove", path); err != nil {
		return err
	}
	return h.inner.Remove(path)
}

func (h *hooked) RemoveAll(path string) error {
	if err := h.f("removeall", path); err != nil {
		return err
	}
	return h.inner.RemoveAll(path)
}

func (h *hooked) SyncDir(path string) error {
	if err := h.f("syncdir", path); err != nil {
		return err
	}
	return h.inner.SyncDir(path)
}

func (h *hooked) Lock(ctx context.Context, path string) (io.Closer, error) {
	if err := h.f("lock", path); err != nil {
		return nil, err
	}
	return h.inner.Lock(ctx, path)
}

func (h *hooked) FreeBytes(path string) (int64, error) {
	if err := h.f("free", path); err != nil {
		return 0, err
	}
	return h.inner.FreeBytes(path)
}

type hookedFile struct {
	inner File
	f     func(op, path string) error
	path  string
}

func (h *hookedFile) Read(p []byte) (int, error) {
	if err := h.f("read", h.path); err != nil {
		return 0, err
	}
	return h.inner.Read(p)
}

func (h *hookedFile) Write(p []byte) (int, error) {
	if err := h.f("write", h.path); err != nil {
		n, _ := h.inner.Write(p[:len(p)/2])
		return n, err
	}
	return h.inner.Write(p)
}

func (h *hookedFile) Sync() error {
	if err := h.f("sync", h.path); err != nil {
		return err
	}
	return h.inner.Sync()
}

func (h *hookedFile) Close() error {
	err := h.f("close", h.path)
	if cerr := h.inner.Close(); err == nil {
		err = cerr
	}
	return err
}
