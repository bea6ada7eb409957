package criu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/utsns"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// maxHostname is the kernel's __NEW_UTS_LEN.
const maxHostname = 64

// RewriteHostname sets the host name in the images of UTS namespaces; the
// domain name stays. Without such an image it does nothing.
//
// It is needed because the root task of a restore first joins the UTS
// namespace that runc names and then writes the names of the image into it
// (CRIU criu/cr-restore.c:restore_task_with_children, join_namespaces before
// prepare_namespace; criu/uts_ns.c:prepare_utsns), so that a container would
// rename its new pod.
func RewriteHostname(imageDir, hostname string) error {
	if hostname == "" || len(hostname) > maxHostname {
		return fmt.Errorf("host name of %d bytes, want 1 to %d: %w", len(hostname), maxHostname, checkpoint.ErrInvalid)
	}
	for _, c := range []byte(hostname) {
		if c <= ' ' || c >= 0x7f || c == '/' {
			return fmt.Errorf("host name %q: %w", hostname, checkpoint.ErrInvalid)
		}
	}
	d, err := openImages(imageDir)
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.names("utsns-*.img")
	if err != nil {
		return err
	}
	for _, name := range names {
		var e utsns.UtsnsEntry
		if err := d.one(&e, name, magicCommon, magicUTS); err != nil {
			return err
		}
		if e.GetNodename() == hostname {
			continue
		}
		e.Nodename = proto.String(hostname)
		if e.Domainname == nil {
			return d.corrupt(name, "no domain name")
		}
		if err := d.replace(name, magicUTS, &e); err != nil {
			return err
		}
	}
	return nil
}

// replaceAt writes a file of mode 0600 and renames it over name.
func replaceAt(dirfd int, name string, data []byte) error {
	tmp := "." + name + ".tmp"
	if err := unix.Unlinkat(dirfd, tmp, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "unlink", Path: tmp, Err: err}
	}
	fd, err := unix.Openat(dirfd, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: tmp, Err: err}
	}
	f := os.NewFile(uintptr(fd), tmp)
	_, err = f.Write(data)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		if err = unix.Renameat(dirfd, tmp, dirfd, name); err == nil {
			return nil
		}
		err = &os.PathError{Op: "rename", Path: name, Err: err}
	}
	return errors.Join(err, unix.Unlinkat(dirfd, tmp, 0))
}

// LinkImages makes dir, mode 0700, a second view of an image directory, for a
// restore that changes images: CRIU follows the links, and the originals stay
// as their checksums say, should they be needed again. The images that
// [RewriteHostname] changes are copies. dir must not exist; after an error the
// caller removes what there is of it.
//
// The links are relative. CRIU opens most images when its tasks already have
// the container's root, relative to a descriptor of dir: an absolute link would
// lead into the container and find nothing ("No pagemap-1.img image"), while
// a relative one starts at dir, in the mount namespace where that was opened.
func LinkImages(imageDir, dir string) error {
	d, err := openImages(imageDir)
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.names("*")
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("link images: %w", err)
	}
	target, err := relative(dir, imageDir)
	if err != nil {
		return fmt.Errorf("link images: %w", err)
	}
	for _, name := range names {
		f, size, err := openRegular(d.fd, name, -1)
		if err != nil {
			return fmt.Errorf("image: %w", err)
		}
		if uts, _ := filepath.Match("utsns-*.img", name); !uts {
			err = os.Symlink(filepath.Join(target, name), filepath.Join(dir, name))
		} else if size > maxEntryBytes {
			err = d.corrupt(name, "%d bytes", size)
		} else {
			b := make([]byte, size)
			if _, err = io.ReadFull(f, b); err == nil {
				err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
			}
		}
		f.Close()
		if err != nil {
			return fmt.Errorf("link images: %w", err)
		}
	}
	return nil
}

// relative is the path that leads from the directory from to the directory to,
// with no link on either side that would make ".." go elsewhere.
func relative(from, to string) (string, error) {
	for _, p := range []*string{&from, &to} {
		real, err := filepath.EvalSymlinks(*p)
		if err != nil {
			return "", err
		}
		if *p, err = filepath.Abs(real); err != nil {
			return "", err
		}
	}
	return filepath.Rel(from, to)
}
