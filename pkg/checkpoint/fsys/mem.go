package fsys

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Mem is a file system in memory that knows what is durable. Its root
// directory "/" exists from the start. It has no symbolic links or other
// special files; [Mem.Mknod] makes something that is not a regular file.
//
// A change of a directory is pending until SyncDir of one of the directories
// that it touches. Pending changes are independent of each other: a crash may
// keep any of them, which is weaker than what journaling file systems promise,
// except that a rename is kept or lost as a whole.
type Mem struct {
	mu      sync.Mutex // guards all below, nodes included
	root    *node
	pending []change
	free    int64
	locks   map[string]chan struct{} // one token each
}

var _ FS = (*Mem)(nil)

// node is a file or directory. The fields with "durable" are what a crash
// leaves for sure.
type node struct {
	mode, durableMode fs.FileMode // with type bits
	mtime             time.Time
	data, durableData []byte
	names             map[string]*node // of a directory
	durableNames      map[string]*node
}

// change is one operation on one or two directories.
type change []edit

// edit sets a name in a directory, or deletes it where child is nil.
type edit struct {
	dir   *node
	name  string
	child *node
}

// NewMem makes an empty file system with 1 TiB free.
func NewMem() *Mem {
	return &Mem{root: newNode(fs.ModeDir | 0o755), free: 1 << 40, locks: map[string]chan struct{}{}}
}

func newNode(mode fs.FileMode) *node {
	n := &node{mode: mode, durableMode: mode, mtime: time.Now()}
	if mode.IsDir() {
		n.names, n.durableNames = map[string]*node{}, map[string]*node{}
	}
	return n
}

// CrashClone is the file system as a crash at this moment could leave it: all
// that is durable, and each pending change and each 512-byte piece of unsynced
// data with the probability keep (0: none, 1: everything). The clone shares
// nothing with m; open files and locks are gone.
func (m *Mem) CrashClone(keep float64, rnd *rand.Rand) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	kept := func() bool { return rnd.Float64() < keep }
	extra := map[*node][]edit{} // kept changes by directory, in order
	for _, c := range m.pending {
		if kept() {
			for _, e := range c {
				extra[e.dir] = append(extra[e.dir], e)
			}
		}
	}
	var clone func(n *node) *node
	clone = func(n *node) *node {
		c := newNode(n.durableMode)
		if kept() {
			c.mode, c.durableMode = n.mode, n.mode
		}
		c.mtime = n.mtime
		if !n.mode.IsDir() {
			c.data = crashData(n, kept, rnd)
			c.durableData = slices.Clone(c.data)
			return c
		}
		names := map[string]*node{}
		for name, child := range n.durableNames {
			names[name] = child
		}
		for _, e := range extra[n] {
			set(names, e.name, e.child)
		}
		for name, child := range names {
			cc := clone(child)
			c.names[name], c.durableNames[name] = cc, cc
		}
		return c
	}
	c := NewMem()
	c.root, c.free = clone(m.root), m.free
	return c
}

func crashData(n *node, kept func() bool, rnd *rand.Rand) []byte {
	size := len(n.durableData)
	if grown := len(n.data) - size; grown > 0 {
		switch {
		case !kept():
		case kept(): // the usual way
			size += grown
		default:
			size += rnd.IntN(grown + 1)
		}
	}
	out := make([]byte, size) // a piece that was never written reads as zeros
	copy(out, n.durableData)
	for at := 0; at < size; at += 512 {
		if end := min(at+512, size, len(n.data)); at < end && kept() {
			copy(out[at:end], n.data[at:end])
		}
	}
	return out
}

func set(names map[string]*node, name string, child *node) {
	if child == nil {
		delete(names, name)
	} else {
		names[name] = child
	}
}

func pathError(op, p string, err error) error { return &fs.PathError{Op: op, Path: p, Err: err} }

// find walks to the node; m.mu is held.
func (m *Mem) find(p string) (*node, error) {
	if !path.IsAbs(p) || path.Clean(p) != p {
		return nil, syscall.EINVAL
	}
	n := m.root
	for _, name := range strings.Split(strings.Trim(p, "/"), "/") {
		if name == "" {
			continue
		}
		if !n.mode.IsDir() {
			return nil, syscall.ENOTDIR
		}
		if n = n.names[name]; n == nil {
			return nil, syscall.ENOENT
		}
	}
	return n, nil
}

func (m *Mem) findDir(p string) (*node, error) {
	n, err := m.find(p)
	if err == nil && !n.mode.IsDir() {
		err = syscall.ENOTDIR
	}
	return n, err
}

func (m *Mem) apply(c change) {
	for _, e := range c {
		set(e.dir.names, e.name, e.child)
		e.dir.mtime = time.Now()
	}
	m.pending = append(m.pending, c)
}

func (m *Mem) add(op, p string, mode fs.FileMode) (*node, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	dir, err := m.findDir(path.Dir(p))
	if err != nil {
		return nil, pathError(op, p, err)
	}
	if p == "/" || dir.names[path.Base(p)] != nil {
		return nil, pathError(op, p, syscall.EEXIST)
	}
	n := newNode(mode)
	m.apply(change{{dir, path.Base(p), n}})
	return n, nil
}

func (m *Mem) Mkdir(p string, mode fs.FileMode) error {
	_, err := m.add("mkdir", p, fs.ModeDir|mode)
	return err
}

// Mknod makes something with the type bits of mode.
func (m *Mem) Mknod(p string, mode fs.FileMode) error {
	_, err := m.add("mknod", p, mode)
	return err
}

func (m *Mem) Create(p string, mode fs.FileMode) (File, error) {
	n, err := m.add("create", p, mode)
	if err != nil {
		return nil, err
	}
	return &memFile{m: m, n: n, writable: true}, nil
}

func (m *Mem) Open(p string) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find(p)
	if err == nil && !n.mode.IsRegular() {
		err = ErrNotRegular
		if n.mode.Type() == fs.ModeSymlink {
			err = syscall.ELOOP
		}
	}
	if err != nil {
		return nil, pathError("open", p, err)
	}
	return &memFile{m: m, n: n}, nil
}

func (m *Mem) Lstat(p string) (fs.FileInfo, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find(p)
	if err != nil {
		return nil, pathError("lstat", p, err)
	}
	return n.info(path.Base(p)), nil
}

func (m *Mem) ReadDir(p string) ([]fs.DirEntry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.findDir(p)
	if err != nil {
		return nil, pathError("readdir", p, err)
	}
	var entries []fs.DirEntry
	for name, child := range n.names {
		entries = append(entries, fs.FileInfoToDirEntry(child.info(name)))
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, nil
}

func (m *Mem) Chmod(p string, mode fs.FileMode) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find(p)
	if err == nil && !n.mode.IsRegular() && !n.mode.IsDir() {
		err = ErrNotRegular
	}
	if err != nil {
		return pathError("chmod", p, err)
	}
	n.mode = n.mode.Type() | mode
	return nil
}

func (m *Mem) Rename(from, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	src, err := m.findDir(path.Dir(from))
	if err != nil {
		return pathError("rename", from, err)
	}
	dst, err := m.findDir(path.Dir(to))
	if err != nil {
		return pathError("rename", to, err)
	}
	n := src.names[path.Base(from)]
	switch {
	case n == nil:
		return pathError("rename", from, syscall.ENOENT)
	case dst.names[path.Base(to)] != nil:
		return pathError("rename", to, syscall.EEXIST)
	case strings.HasPrefix(to, from+"/"):
		return pathError("rename", to, syscall.EINVAL)
	}
	m.apply(change{{src, path.Base(from), nil}, {dst, path.Base(to), n}})
	return nil
}

func (m *Mem) Remove(p string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find(p)
	switch {
	case err != nil:
		return pathError("remove", p, err)
	case len(n.names) > 0:
		return pathError("remove", p, syscall.ENOTEMPTY)
	case p == "/":
		return pathError("remove", p, syscall.EBUSY)
	}
	dir, _ := m.find(path.Dir(p))
	m.apply(change{{dir, path.Base(p), nil}})
	return nil
}

func (m *Mem) RemoveAll(p string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find(p)
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	if err != nil {
		return pathError("removeall", p, err)
	}
	var empty func(n *node)
	empty = func(n *node) {
		for name, child := range n.names {
			empty(child)
			m.apply(change{{n, name, nil}})
		}
	}
	empty(n)
	if dir, _ := m.find(path.Dir(p)); p != "/" {
		m.apply(change{{dir, path.Base(p), nil}})
	}
	return nil
}

func (m *Mem) SyncDir(p string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.findDir(p)
	if err != nil {
		return pathError("syncdir", p, err)
	}
	n.durableMode = n.mode
	rest := m.pending[:0]
	for _, c := range m.pending {
		if !slices.ContainsFunc(c, func(e edit) bool { return e.dir == n }) {
			rest = append(rest, c)
			continue
		}
		for _, e := range c {
			set(e.dir.durableNames, e.name, e.child)
		}
	}
	clear(m.pending[len(rest):])
	m.pending = rest
	return nil
}

func (m *Mem) Lock(ctx context.Context, p string) (io.Closer, error) {
	m.mu.Lock()
	n, err := m.find(p)
	if err == nil && !n.mode.IsRegular() {
		err = ErrNotRegular
	}
	l := m.locks[p]
	if l == nil {
		l = make(chan struct{}, 1)
		m.locks[p] = l
	}
	m.mu.Unlock()
	if err != nil {
		return nil, pathError("lock", p, err)
	}
	select {
	case l <- struct{}{}:
		return memLock(l), nil
	case <-ctx.Done():
		return nil, pathError("lock", p, context.Cause(ctx))
	}
}

type memLock chan struct{}

func (l memLock) Close() error {
	select {
	case <-l:
		return nil
	default:
		return fs.ErrClosed
	}
}

func (m *Mem) FreeBytes(p string) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, err := m.find(p); err != nil {
		return 0, pathError("statfs", p, err)
	}
	return m.free, nil
}

type memFile struct {
	m        *Mem
	n        *node
	at       int
	writable bool
	closed   bool
}

func (f *memFile) Read(p []byte) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	switch {
	case f.closed:
		return 0, fs.ErrClosed
	case f.writable:
		return 0, syscall.EBADF
	case f.at >= len(f.n.data):
		return 0, io.EOF
	}
	n := copy(p, f.n.data[f.at:])
	f.at += n
	return n, nil
}

func (f *memFile) Write(p []byte) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	switch {
	case f.closed:
		return 0, fs.ErrClosed
	case !f.writable:
		return 0, syscall.EBADF
	}
	f.n.data = append(f.n.data, p...)
	f.n.mtime = time.Now()
	return len(p), nil
}

func (f *memFile) Sync() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return fs.ErrClosed
	}
	f.n.durableData, f.n.durableMode = slices.Clone(f.n.data), f.n.mode
	return nil
}

func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return fs.ErrClosed
	}
	f.closed = true
	return nil
}

func (n *node) info(name string) fs.FileInfo {
	return memInfo{name, int64(len(n.data)), n.mode, n.mtime}
}

type memInfo struct {
	name  string
	size  int64
	mode  fs.FileMode
	mtime time.Time
}

func (i memInfo) Name() string       { return i.name }
func (i memInfo) Size() int64        { return i.size }
func (i memInfo) Mode() fs.FileMode  { return i.mode }
func (i memInfo) ModTime() time.Time { return i.mtime }
func (i memInfo) IsDir() bool        { return i.mode.IsDir() }
func (i memInfo) Sys() any           { return nil }
