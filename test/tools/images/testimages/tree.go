package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// tree is the content of one layer: what lies at each path (without a leading slash).
type tree struct {
	rootfs  string // the Debian root file system that files are taken from
	entries map[string]entry
}

type entry struct {
	tar.Header
	data []byte
}

func newTree(rootfs string) *tree { return &tree{rootfs: rootfs, entries: map[string]entry{}} }

// real maps a path to where Debian's merged /usr keeps it.
func real(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		if strings.HasPrefix(name, dir+"/") {
			return "usr/" + name
		}
	}
	return name
}

func (t *tree) put(name string, h tar.Header, data []byte) {
	h.Name, h.Size = name, int64(len(data))
	t.entries[name] = entry{h, data}
	if dir := path.Dir(name); dir != "." {
		if _, ok := t.entries[dir]; !ok {
			t.dir(dir, 0o755, 0, 0)
		}
	}
}

func (t *tree) dir(name string, mode int64, uid, gid int) {
	t.put(name, tar.Header{Typeflag: tar.TypeDir, Mode: mode, Uid: uid, Gid: gid}, nil)
}

func (t *tree) file(name string, mode int64, data []byte) {
	t.put(name, tar.Header{Typeflag: tar.TypeReg, Mode: mode}, data)
}

func (t *tree) symlink(name, target string) {
	t.put(name, tar.Header{Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}, nil)
}

func (t *tree) hardlink(name, target string) {
	t.put(name, tar.Header{Typeflag: tar.TypeLink, Linkname: target, Mode: 0o755}, nil)
}

// add copies a file, a symlink with what it names, or a directory with all below it from the root
// file system, and the shared libraries that any of them loads.
func (t *tree) add(names ...string) error {
	for _, name := range names {
		root := real(name)
		err := filepath.WalkDir(filepath.Join(t.rootfs, root), func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.Name() == "__pycache__" { // holds times of its sources, which a layer does not keep
				return fs.SkipDir
			}
			rel, err := filepath.Rel(t.rootfs, p)
			if err != nil {
				return err
			}
			return t.addOne(rel, p, d)
		})
		if err != nil {
			return fmt.Errorf("adding /%s: %w", name, err)
		}
	}
	return nil
}

func (t *tree) addOne(name, file string, d fs.DirEntry) error {
	if _, ok := t.entries[name]; ok && !d.IsDir() {
		return nil
	}
	info, err := d.Info()
	if err != nil {
		return err
	}
	stat := info.Sys().(*syscall.Stat_t)
	mode := int64(stat.Mode & 0o7777)
	switch {
	case d.IsDir():
		t.dir(name, mode, int(stat.Uid), int(stat.Gid))
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(file)
		if err != nil {
			return err
		}
		t.symlink(name, target)
		if !path.IsAbs(target) {
			target = path.Join(path.Dir(name), target)
		}
		return t.add(target)
	case info.Mode().IsRegular():
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		t.put(name, tar.Header{Typeflag: tar.TypeReg, Mode: mode, Uid: int(stat.Uid), Gid: int(stat.Gid)}, data)
		return t.addLibraries(data)
	}
	return nil
}

// copy puts a directory with all below it, which belongs to nobody, at the path to, owned by root.
func (t *tree) copy(from, to string) error {
	return filepath.WalkDir(from, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, file)
		if err != nil {
			return err
		}
		name := path.Join(to, rel)
		if name == "." {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			t.dir(name, 0o755, 0, 0)
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(file)
			if err != nil {
				return err
			}
			t.symlink(name, target)
		case info.Mode().IsRegular():
			data, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			t.file(name, int64(info.Mode().Perm()), data)
		}
		return nil
	})
}

// addLibraries adds the program interpreter and the libraries that an ELF file names, if it is one.
func (t *tree) addLibraries(data []byte) error {
	if !bytes.HasPrefix(data, []byte(elf.ELFMAG)) {
		return nil
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			name := make([]byte, p.Filesz)
			if _, err := p.ReadAt(name, 0); err != nil {
				return err
			}
			if err := t.add(string(bytes.TrimRight(name, "\x00"))); err != nil {
				return err
			}
		}
	}
	libraries, err := f.ImportedLibraries()
	if err != nil {
		return err
	}
	for _, lib := range libraries {
		found, err := filepath.Glob(filepath.Join(t.rootfs, "usr/lib/*-linux-gnu*", lib))
		if err != nil {
			return err
		}
		if len(found) == 0 {
			return fmt.Errorf("library %s: %w", lib, errors.ErrUnsupported)
		}
		rel, err := filepath.Rel(t.rootfs, found[0])
		if err != nil {
			return err
		}
		if err := t.add(rel); err != nil {
			return err
		}
	}
	return nil
}

// layer is the tree as an uncompressed layer. The same tree gives the same bytes.
func (t *tree) layer() (v1.Layer, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	names := make([]string, 0, len(t.entries))
	for name := range t.entries {
		names = append(names, name)
	}
	slices.Sort(names)
	// Hard links last, as their target must be there before them.
	slices.SortStableFunc(names, func(a, b string) int {
		return linkOrder(t.entries[a]) - linkOrder(t.entries[b])
	})
	for _, name := range names {
		e := t.entries[name]
		e.ModTime = time.Unix(1, 0)
		if e.Typeflag == tar.TypeDir {
			e.Name += "/"
		}
		if err := w.WriteHeader(&e.Header); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return static.NewLayer(buf.Bytes(), types.OCIUncompressedLayer), nil
}

func linkOrder(e entry) int {
	if e.Typeflag == tar.TypeLink {
		return 1
	}
	return 0
}
