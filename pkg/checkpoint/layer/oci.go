package layer

import (
	"archive/tar"
	"bufio"
	"context"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// Names by which an OCI layer says what is gone (image-spec, layer.md).
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// WriteOCIDiff turns the layer in r into an OCI layer diff, uncompressed:
// whiteouts become files .wh.NAME, opaque directories get a file .wh..wh..opq,
// attributes of the overlay go, files with holes are written in full, devices
// stay.
//
// An error wraps [checkpoint.ErrUnsupported] where OCI has no way to say it: a
// directory that the overlay redirects (redirect_dir=on), a file whose data is
// on a lower layer (metacopy=on), a name that begins with ".wh.". Extended
// attributes with "=" in their names are lost.
func WriteOCIDiff(ctx context.Context, w io.Writer, r io.Reader) error {
	dec, err := newDecoder(bufio.NewReaderSize(r, bufferSize))
	if err != nil {
		return err
	}
	bw := bufio.NewWriterSize(w, bufferSize)
	c := &converter{dec: dec, tw: tar.NewWriter(bw), buf: make([]byte, bufferSize)}
	for {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("layer: convert: %w", err)
		}
		e, err := dec.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := c.entry(ctx, e); err != nil {
			return fmt.Errorf("layer: convert %.200q: %w", e.name, err)
		}
	}
	if err := c.tw.Close(); err != nil {
		return fmt.Errorf("layer: convert: %w", err)
	}
	if err := bw.Flush(); err != nil {
		return fmt.Errorf("layer: convert: %w", err)
	}
	return nil
}

type converter struct {
	dec *decoder
	tw  *tar.Writer
	buf []byte
}

func (c *converter) entry(ctx context.Context, e *entry) error {
	dir, base := path.Split(e.name)
	if strings.HasPrefix(base, whiteoutPrefix) {
		return fmt.Errorf("in an OCI layer, this name is a whiteout: %w", checkpoint.ErrUnsupported)
	}
	for _, name := range []string{"redirect", "metacopy"} {
		if _, ok := e.xattr(xattrOverlay + name); ok {
			return fmt.Errorf("part of it lies on another layer (%s%s): %w", xattrOverlay, name, checkpoint.ErrUnsupported)
		}
	}
	if _, ok := e.xattr(xattrOverlay + "whiteout"); e.whiteout() || ok && e.Typeflag == tar.TypeReg && e.size == 0 {
		return c.marker(e, dir+whiteoutPrefix+base)
	}
	h := &tar.Header{
		Format: tar.FormatPAX, Typeflag: e.Typeflag, Name: e.Name, Linkname: e.Linkname, Size: e.size, Mode: e.Mode,
		Uid: e.Uid, Gid: e.Gid, ModTime: e.ModTime, AccessTime: e.AccessTime, Devmajor: e.Devmajor, Devminor: e.Devminor,
		PAXRecords: map[string]string{},
	}
	for _, x := range e.xattrs {
		if !strings.HasPrefix(x.name, xattrOverlay) && !strings.Contains(x.name, "=") {
			h.PAXRecords[recordXattr+x.name] = x.value
		}
	}
	if err := c.tw.WriteHeader(h); err != nil {
		return err
	}
	if v, _ := e.xattr(xattrOverlay + "opaque"); v == "y" && e.Typeflag == tar.TypeDir {
		return c.marker(e, path.Join(e.name, opaqueName))
	}
	return c.content(ctx, e)
}

// marker writes an empty file with the owner and times of e.
func (c *converter) marker(e *entry, name string) error {
	return c.tw.WriteHeader(&tar.Header{
		Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: name, Uid: e.Uid, Gid: e.Gid, ModTime: e.ModTime,
	})
}

// content writes a file's data with its holes as zeros.
func (c *converter) content(ctx context.Context, e *entry) error {
	copyTo := func(end, from int64, fill func([]byte) error) error {
		for from < end {
			if err := ctx.Err(); err != nil {
				return err
			}
			b := c.buf[:min(end-from, bufferSize)]
			if err := fill(b); err != nil {
				return err
			}
			if _, err := c.tw.Write(b); err != nil {
				return err
			}
			from += int64(len(b))
		}
		return nil
	}
	zeros := func(b []byte) error { clear(b); return nil }
	var at int64
	for _, s := range e.data {
		if err := copyTo(s.off, at, zeros); err != nil {
			return err
		}
		at = s.off + s.len
		if err := copyTo(at, s.off, c.dec.body); err != nil {
			return err
		}
	}
	return copyTo(e.size, at, zeros)
}
