package criu

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// Bounds of what is held in memory before a restore; CRIU brings back by itself what
// is larger, and those that are too many.
const (
	maxTmpfs      = 4         // of a container
	maxTmpfsImage = 256 << 10 // bytes, compressed
	maxTmpfsBytes = 1 << 20   // bytes of the archive
	maxTmpfsFiles = 1024
)

// tmpfsKey begins the names by which CRIU is given what [TakeTmpfs] took.
const tmpfsKey = "stasis-tmpfs-"

// Tmpfs is a small tmpfs of a container (/dev, or /sys/fs/cgroup on cgroup version
// 1) that is made before CRIU starts, and given to it as an external mount.
type Tmpfs struct {
	Key     string // of the external mount: letters, digits and "-"
	Source  string // as for mount(2), like Options
	Options string
	files   []tmpfsFile
}

type tmpfsFile struct {
	header  *tar.Header // its name is local, see [filepath.IsLocal]
	content []byte
}

// TakeTmpfs takes the small tmpfs out of what CRIU has to restore, and makes them
// external mounts. dir is the view of imageDir that [LinkImages] made; its list of
// mounts is replaced by a copy where there is one. Whoever restores must mount each,
// [Tmpfs.Fill] it, and tell CRIU where it is ([ConfigOptions.External]).
//
// It is for speed alone. CRIU runs `tar --gzip` for each tmpfs, which are three
// processes, one after another, while all else waits (criu/filesystems.c:
// tmpfs_restore); an external mount it binds (criu/mount-v2.c:do_bind_mount_v2), and
// what is bound from it in turn, like /dev/null over masked files, it finds there
// (can_mount_now_v2). A dump finds the tmpfs as any other. What is unusual in any way
// stays as it is.
func TakeTmpfs(imageDir, dir string) ([]Tmpfs, error) {
	d, err := openImages(imageDir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.names("mountpoints-*.img")
	if err != nil || len(names) != 1 {
		return nil, err // none, or the container has made mount namespaces of its own
	}
	var entries []*mnt.MntEntry
	whole := map[uint32]int{} // mounts of all of a file system, by its device
	err = each(d, names[0], magicMounts, new(mnt.MntEntry), func(e *mnt.MntEntry) error {
		if len(entries) >= maxTasks {
			return d.corrupt(names[0], "more than %d mounts", maxTasks)
		}
		entries = append(entries, proto.CloneOf(e))
		if e.GetRoot() == "/" {
			whole[e.GetRootDev()]++
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var taken []Tmpfs
	for _, e := range entries {
		if len(taken) == maxTmpfs {
			break
		}
		if !plainTmpfs(e) || whole[e.GetRootDev()] != 1 {
			continue
		}
		files, err := d.tmpfs(fmt.Sprintf("tmpfs-dev-%d.tar.gz.img", e.GetRootDev()))
		if errors.Is(err, errUnusual) || absent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		key := fmt.Sprintf("%s%d", tmpfsKey, e.GetMntId())
		if slices.ContainsFunc(entries, func(o *mnt.MntEntry) bool { return o.GetExtKey() == key }) {
			return nil, d.corrupt(names[0], "mount %d and another are called %q", e.GetMntId(), key)
		}
		e.ExtKey = &key
		taken = append(taken, Tmpfs{Key: key, Source: e.GetSource(), Options: e.GetOptions(), files: files})
	}
	if len(taken) == 0 {
		return nil, nil
	}
	view, err := openImages(dir)
	if err != nil {
		return nil, err
	}
	defer view.Close()
	all := make([]proto.Message, len(entries))
	for i, e := range entries {
		all[i] = e
	}
	return taken, view.replace(names[0], magicMounts, all...)
}

// plainTmpfs tells whether a mount is all of a tmpfs, which nothing outside of the
// container shares.
func plainTmpfs(e *mnt.MntEntry) bool {
	return fstype(e) == mnt.Fstype_TMPFS && e.GetRoot() == "/" && path.Clean("/"+e.GetMountpoint()) != "/" &&
		e.GetExtKey() == "" && !e.GetExtMount() && !e.GetWithPlugin() && !e.GetDeleted() &&
		e.GetSharedId() == 0 && e.GetMasterId() == 0 && e.GetSbFlags() == 0 &&
		!strings.ContainsRune(e.GetSource()+e.GetOptions(), 0)
}

// errUnusual is that of content that is left to CRIU and tar.
var errUnusual = errors.New("unusual content")

// tmpfs reads the content of a tmpfs, an archive that GNU tar has made.
func (d *images) tmpfs(name string) ([]tmpfsFile, error) {
	f, size, err := openRegular(d.fd, name, -1)
	if err != nil {
		return nil, fmt.Errorf("image: %w", err)
	}
	defer f.Close()
	if size > maxTmpfsImage {
		return nil, errUnusual
	}
	z, err := gzip.NewReader(io.LimitReader(f, size))
	if err != nil {
		return nil, d.corrupt(name, "gzip: %v", err)
	}
	b, err := io.ReadAll(io.LimitReader(z, maxTmpfsBytes+1))
	if err != nil {
		return nil, d.corrupt(name, "gzip: %v", err)
	}
	if len(b) > maxTmpfsBytes {
		return nil, errUnusual
	}
	var files []tmpfsFile
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, nil
		}
		if err != nil {
			return nil, d.corrupt(name, "tar: %v", err)
		}
		if h.Name = path.Clean(h.Name); !filepath.IsLocal(h.Name) {
			return nil, d.corrupt(name, "%q is not below the directory", h.Name)
		}
		// Records may make of a small archive a large file.
		if len(h.PAXRecords) > 0 || len(files) == maxTmpfsFiles || h.Size > maxTmpfsBytes {
			return nil, errUnusual
		}
		file := tmpfsFile{header: h}
		switch h.Typeflag {
		case tar.TypeReg:
			if file.content, err = io.ReadAll(r); err != nil {
				return nil, d.corrupt(name, "tar: %v", err)
			}
		case tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		default:
			return nil, errUnusual
		}
		files = append(files, file)
	}
}

// Fill makes in dir, which must be empty, what was in the tmpfs. Nothing is made
// outside of it, whatever the images say.
func (t *Tmpfs) Fill(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for i := range t.files {
		if err := t.files[i].make(root); err != nil {
			return fmt.Errorf("tmpfs %s: %w", t.Key, err)
		}
	}
	// Last, for what is made in a directory changes its time.
	for i := range t.files {
		if err := t.files[i].setTime(root); err != nil {
			return fmt.Errorf("tmpfs %s: %w", t.Key, err)
		}
	}
	return nil
}

// make makes the file, but for its time.
func (f *tmpfsFile) make(root *os.Root) error {
	h := f.header
	switch h.Typeflag {
	case tar.TypeDir:
		if h.Name == "." {
			break
		}
		if err := root.Mkdir(h.Name, 0o700); err != nil {
			return err
		}
	case tar.TypeReg:
		// What is there already may be a FIFO.
		file, err := root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = file.Write(f.content)
		if err := errors.Join(err, file.Close()); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if err := root.Symlink(h.Linkname, h.Name); err != nil {
			return err
		}
		return root.Lchown(h.Name, h.Uid, h.Gid)
	case tar.TypeLink:
		return root.Link(path.Clean(h.Linkname), h.Name) // its attributes are the other's
	default:
		if err := f.mknod(root); err != nil {
			return err
		}
	}
	if err := root.Lchown(h.Name, h.Uid, h.Gid); err != nil {
		return err
	}
	return root.Chmod(h.Name, h.FileInfo().Mode()) // the change of the owner has taken some bits
}

func (f *tmpfsFile) mknod(root *os.Root) error {
	kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[f.header.Typeflag]
	dev := unix.Mkdev(uint32(f.header.Devmajor), uint32(f.header.Devminor))
	return f.inParent(root, "mknod", func(dir int, name string) error { return unix.Mknodat(dir, name, kind|0o600, int(dev)) })
}

func (f *tmpfsFile) setTime(root *os.Root) error {
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: f.header.ModTime.Unix()}} // tar knows no less than seconds
	return f.inParent(root, "utime", func(dir int, name string) error {
		return unix.UtimesNanoAt(dir, name, times, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// inParent calls do with the directory that the file is in, and its name there.
func (f *tmpfsFile) inParent(root *os.Root, op string, do func(dir int, name string) error) error {
	dir, err := root.OpenFile(path.Dir(f.header.Name), unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := do(int(dir.Fd()), path.Base(f.header.Name)); err != nil {
		return &fs.PathError{Op: op, Path: f.header.Name, Err: err}
	}
	return nil
}
